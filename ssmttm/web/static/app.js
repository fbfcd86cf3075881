// The page: what the user sets goes to the server, what the server sends is heard and drawn.

import { Player } from "./player.js";
import { Scope } from "./scope.js";

const MESSAGES_PER_SECOND = 10;
const FIRST_LEAD = 0.7; // seconds generated ahead of what is heard: a change is heard after at most that
const LONGEST_LEAD = 8;
const LIVE = ["guidance_scale", "temperature", "bpm"]; // sliders that may change while the music plays

const $ = (id) => document.getElementById(id);
const player = new Player(onReport);
const scope = new Scope($("waveform"), $("spectrogram"));

let models = [];
let socket = null;
let clip = null; // of the server: {id, name, seconds}
let lead = FIRST_LEAD;
let underruns = 0;
let ended = false; // the server has sent all
let start = 0; // position where the present epoch begins, in seconds
let heard = 0; // seconds of it
let heardAt = 0; // when that was reported
let seed = 0;
let words = ""; // that the present music follows
let drawn = ""; // controls that the model drew from the words, as they are shown
let marks = []; // changes that are not heard yet: {position, prompt}
let marked = false;
let lastMessage = 0;

const state = () => document.body.dataset.state; // idle, waiting, playing, paused

function setState(value, text) {
  document.body.dataset.state = value;
  const on = value !== "idle";
  $("play").textContent = on ? "Stop" : "Play";
  $("pause").disabled = value !== "playing" && value !== "paused";
  $("pause").textContent = value === "paused" ? "Go on" : "Pause";
  $("keep").disabled = value !== "playing" || ended;
  $("change").disabled = value !== "playing" || ended;
  if (text !== undefined) $("status").textContent = text;
  if (!on) $("level").value = 0;
}

function showError(message) {
  $("error").textContent = message;
  $("error").hidden = !message;
}

function send(message) {
  if (socket && socket.readyState === WebSocket.OPEN) socket.send(JSON.stringify(message));
}

// --- settings -------------------------------------------------------------------------------------------------------

function sliderValue(id) {
  const slider = $(id);
  return slider.disabled || (id === "bpm" && slider.value === slider.min) ? null : Number(slider.value);
}

function showSlider(id) {
  const value = sliderValue(id);
  const free = id === "bpm" && drawn ? `free: ${drawn}` : "free";
  const off = $(id).disabled ? "–" : free;
  document.querySelector(`output[for="${id}"]`).textContent = value === null ? off : String(value);
}

// Show the tempo, key and metre that the model drew from the words, if it does.
function showDrawn({ controls = {} }) {
  drawn = [controls.bpm && Math.round(controls.bpm), controls.key, controls.metre].filter(Boolean).join(", ");
  showSlider("bpm");
}

function model() {
  return models.find((entry) => entry.id === $("model").value) || models[0];
}

function onModel() {
  for (const id of ["guidance_scale", "temperature"]) $(id).value = model()[id];
  $("bpm").disabled = !model().controls.includes("bpm");
  $("bpm").title = $("bpm").disabled ? "This model was not trained with a tempo." : "";
  LIVE.forEach(showSlider);
}

function settings() {
  const number = (id) => ($(id).value === "" ? null : Number($(id).value));
  return {
    prompt: $("prompt").value, model: model().id, seed: number("seed"), duration: number("duration"),
    negative_prompt: $("negative_prompt").value.trim() || null, continue_from: clip && clip.id,
    ...Object.fromEntries(LIVE.map((id) => [id, sliderValue(id)])),
  };
}

// --- the stream -----------------------------------------------------------------------------------------------------

function connect() {
  if (socket && socket.readyState === WebSocket.OPEN) return Promise.resolve();
  return new Promise((resolve, reject) => {
    const address = new URL("v1/stream", location.href.replace(/^http/, "ws"));
    address.search = "";
    socket = new WebSocket(address);
    socket.binaryType = "arraybuffer";
    socket.onopen = resolve;
    socket.onmessage = ({ data }) => (typeof data === "string" ? onMessage(JSON.parse(data)) : player.push(data));
    socket.onclose = () => {
      reject(new Error("no connection"));
      if (state() !== "idle") stop("The connection to the server is lost: press play to try again.");
    };
  });
}

async function play() {
  showError("");
  setState("waiting", "Starting …");
  try {
    await player.prepare(model().sample_rate);
    await connect();
  } catch (error) {
    stop("The server does not answer: is it still running?", String(error));
    return;
  }
  if (state() !== "waiting") return; // stopped meanwhile
  lead = FIRST_LEAD;
  send({ type: "start", lead, ...settings() });
}

function stop(message, detail) {
  player.stop();
  setState("idle", detail ? "" : "Press play, or Enter.");
  if (message) showError(message);
}

function change(values) {
  if (state() === "playing" && !ended) send({ type: "change", ...values });
}

function changeWords() {
  change({ prompt: $("prompt").value });
}

function onMessage(message) {
  switch (message.type) {
    case "queued":
      setState("waiting", `Waiting: number ${message.position} in the queue.`);
      break;
    case "started":
      onStarted(message);
      break;
    case "changed":
      showDrawn(message);
      if (message.prompt) {
        marks.push(message);
        words = message.prompt;
        showEdited();
      }
      break;
    case "moment":
      addMoment(message);
      break;
    case "finished":
      ended = true;
      player.end();
      setState(state());
      break;
    case "recording_full":
      showError("The recording for download is full; the music plays on.");
      break;
    case "refused":
      showError(message.message);
      if (state() === "waiting") stop();
      break;
    case "error":
      stop(message.message);
      break;
  }
}

function onStarted(message) {
  start = message.position;
  heard = 0;
  heardAt = 0;
  ended = false;
  underruns = 0;
  marks = [];
  player.begin(message.epoch, message.channels, lead / 2);
  if (start === 0) {
    scope.clear();
    $("moments").replaceChildren();
    words = $("prompt").value;
    $("heard").textContent = words;
  }
  scope.begin(0);
  marked = start > 0;
  for (const suffix of ["wav", "flac", "mp3", "json"]) {
    $(`download_${suffix}`).href = `v1/recordings/${message.recording}.${suffix}`;
  }
  $("seed").placeholder = `random (now ${message.seed})`;
  seed = message.seed;
  setState("playing");
  showEdited();
  showDrawn(message);
}

// What the audio thread has played, every 50 ms.
function onReport(report) {
  if (state() !== "playing") return;
  heard = report.played;
  heardAt = performance.now();
  $("level").value = report.peak;
  showTime(start + heard);
  while (marks.length && marks[0].position <= start + heard) {
    $("heard").textContent = marks.shift().prompt;
    marked = true;
  }
  if (report.underruns > underruns && !ended) {
    underruns = report.underruns;
    lead = Math.min(LONGEST_LEAD, lead * 1.5);
    player.wait(lead / 2);
  }
  $("status").textContent = report.playing ? `Playing, seed ${seed}.` : "Waiting for the model …";
  const now = performance.now();
  if (now - lastMessage > 1000 / MESSAGES_PER_SECOND) {
    lastMessage = now;
    send({ type: "played", epoch: report.epoch, seconds: heard, lead });
  }
  if (report.done) stop();
}

function showTime(seconds) {
  $("time").textContent = clock(seconds);
}

function clock(seconds) {
  const tenths = Math.floor(seconds * 10);
  return `${Math.floor(tenths / 600)}:${String(Math.floor(tenths / 10) % 60).padStart(2, "0")}.${tenths % 10}`;
}

function draw() {
  const now = heard + Math.min(0.05, (performance.now() - heardAt) / 1000); // reports come every 50 ms
  if (state() === "playing" && scope.draw(player.analyser, now, marked)) marked = false;
  requestAnimationFrame(draw);
}

// --- moments --------------------------------------------------------------------------------------------------------

function addMoment({ moment, position }) {
  const item = document.createElement("li");
  const time = document.createElement("span");
  time.textContent = clock(position);
  item.append(time, returnButton(moment, position, "As it was", () => null));
  item.append(returnButton(moment, position, "Differently", () => Math.floor(Math.random() * 2 ** 32)));
  $("moments").append(item);
}

function returnButton(moment, position, text, seed) {
  const button = document.createElement("button");
  button.type = "button";
  button.textContent = text;
  button.setAttribute("aria-label", `Go on from ${clock(position)} ${text.toLowerCase()}`);
  button.onclick = async () => {
    showError("");
    await player.prepare(player.context.sampleRate);
    setState("waiting", `Back to ${clock(position)} …`);
    send({ type: "resume", moment, seed: seed() });
  };
  return button;
}

// --- uploads --------------------------------------------------------------------------------------------------------

async function upload() {
  const [file] = $("clip").files;
  clip = null;
  if (file) {
    $("clip_state").textContent = `Uploading ${file.name} …`;
    showError("");
    try {
      clip = await post(`v1/clips?model=${encodeURIComponent(model().id)}`, file);
    } catch (error) {
      showError(error.message);
      $("clip").value = "";
    }
  }
  $("no_clip").hidden = !clip;
  $("clip_state").textContent = clip
    ? `The next play goes on from ${clip.name} (${clip.seconds.toFixed(1)} s).`
    : "These count from the next play on.";
}

async function post(address, file) {
  const body = new FormData();
  body.append("file", file);
  let response;
  try {
    response = await fetch(address, { method: "POST", body });
  } catch {
    throw new Error("The upload failed: the file is too large, or the server is gone.");
  }
  const answer = await response.json();
  if (!response.ok) throw new Error(answer.error);
  return answer;
}

// --- events ---------------------------------------------------------------------------------------------------------

function showEdited() {
  document.body.classList.toggle("edited", state() === "playing" && $("prompt").value !== words);
}

function slow(action) {
  let timer = 0;
  return () => {
    clearTimeout(timer);
    timer = setTimeout(action, 150);
  };
}

$("play").onclick = (event) => {
  event.preventDefault();
  if (state() === "idle") play();
  else {
    send({ type: "stop" });
    stop();
  }
};
$("prompt").onkeydown = (event) => {
  if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
  event.preventDefault();
  if (state() === "idle") play();
  else changeWords();
};
$("prompt").oninput = showEdited;
$("words").onsubmit = (event) => event.preventDefault();
$("change").onclick = changeWords;
$("pause").onclick = async () => {
  if (state() === "playing") {
    await player.context.suspend();
    setState("paused", "Paused.");
  } else {
    await player.context.resume();
    setState("playing");
  }
};
$("keep").onclick = () => send({ type: "snapshot" });
for (const id of LIVE) {
  const changed = slow(() => sliderValue(id) !== null && change({ [id]: sliderValue(id) }));
  $(id).oninput = () => {
    showSlider(id);
    changed();
  };
}
$("volume").oninput = () => {
  showSlider("volume");
  player.setVolume(Number($("volume").value));
};
$("model").onchange = onModel;
$("clip").onchange = upload;
$("no_clip").onclick = () => {
  $("clip").value = "";
  upload();
};

// A page that is left may be kept frozen, with its connection.
window.addEventListener("pagehide", () => {
  stop();
  socket?.close();
});

async function main() {
  setState("idle");
  showSlider("volume");
  try {
    models = (await (await fetch("v1/models")).json()).data;
  } catch {
    showError("The server does not answer: is it still running?");
    return;
  }
  $("model").replaceChildren(...models.map(({ id }) => new Option(id, id)));
  onModel();
  requestAnimationFrame(draw);
}

main();
