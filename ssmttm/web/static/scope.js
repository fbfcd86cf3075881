// Waveform and spectrogram, drawn as the sound is heard, from the right edge to the left.

const SECONDS = 12; // across the canvas
const SEEN_SECONDS = 0.25; // the analyser knows no more than the last of the sound: a longer gap stays black
const LOWEST_HERTZ = 50;
const BACKGROUND = "#08090c";
const STOPS = [[8, 9, 12], [42, 22, 84], [128, 38, 110], [214, 76, 74], [255, 156, 66], [255, 240, 190]];

export class Scope {
  constructor(waveform, spectrogram) {
    this.canvases = [waveform, spectrogram];
    this.contexts = this.canvases.map((canvas) => canvas.getContext("2d", { alpha: false }));
    this.heights = this.canvases.map((canvas) => canvas.height);
    this.drawn = 0;
    this.colours = Array.from({ length: 256 }, (_, i) => colour(i / 255));
    new ResizeObserver(() => this.resize()).observe(waveform);
    this.resize();
  }

  resize() {
    const scale = window.devicePixelRatio || 1;
    this.canvases.forEach((canvas, index) => {
      const width = Math.max(1, Math.round(canvas.clientWidth * scale));
      const height = Math.round(this.heights[index] * scale);
      if (canvas.width === width && canvas.height === height) return;
      const before = document.createElement("canvas");
      before.width = canvas.width;
      before.height = canvas.height;
      before.getContext("2d").drawImage(canvas, 0, 0);
      canvas.width = width;
      canvas.height = height;
      canvas.style.height = `${this.heights[index]}px`;
      this.contexts[index].drawImage(before, 0, 0, width, height);
    });
  }

  clear() {
    this.contexts.forEach((context, index) => {
      context.fillStyle = BACKGROUND;
      context.fillRect(0, 0, context.canvas.width, this.canvases[index].height);
    });
  }

  // Draw up to a time in seconds, counted as for `begin`; marked: with a line, a change is heard.
  draw(analyser, seconds, marked) {
    const width = this.canvases[0].width;
    const columns = Math.min(width, Math.floor(((seconds - this.drawn) * width) / SECONDS));
    if (columns < 1) return false;
    this.drawn += (columns * SECONDS) / width;
    const seen = Math.min(columns, Math.ceil((SEEN_SECONDS * width) / SECONDS));
    for (const context of this.contexts) {
      context.drawImage(context.canvas, -columns, 0);
      context.fillStyle = BACKGROUND;
      context.fillRect(width - columns, 0, columns, context.canvas.height);
    }
    this.drawWaveform(analyser, width - seen, seen);
    this.drawSpectrum(analyser, width - seen, seen);
    if (marked) this.contexts.forEach((context) => mark(context, width - columns));
    return true;
  }

  // The time of what is drawn next, in seconds.
  begin(seconds) {
    this.drawn = seconds;
  }

  drawWaveform(analyser, x, columns) {
    const context = this.contexts[0];
    const { width, height } = context.canvas;
    const samples = new Float32Array(analyser.fftSize);
    analyser.getFloatTimeDomainData(samples);
    const perColumn = Math.max(1, Math.floor((SECONDS / width) * analyser.context.sampleRate));
    context.fillStyle = "#ffb454";
    for (let column = 0; column < columns; column++) {
      const end = samples.length - (columns - 1 - column) * perColumn;
      let low = 0;
      let high = 0;
      for (const value of samples.subarray(Math.max(0, end - perColumn), Math.max(0, end))) {
        low = Math.min(low, value);
        high = Math.max(high, value);
      }
      const top = (0.5 - 0.48 * high) * height;
      context.fillRect(x + column, top, 1, Math.max(1, 0.48 * (high - low) * height));
    }
  }

  drawSpectrum(analyser, x, columns) {
    const context = this.contexts[1];
    const { height } = context.canvas;
    const bins = new Uint8Array(analyser.frequencyBinCount);
    analyser.getByteFrequencyData(bins);
    const image = context.createImageData(1, height);
    const highest = analyser.context.sampleRate / 2;
    for (let y = 0; y < height; y++) {
      const hertz = LOWEST_HERTZ * (highest / LOWEST_HERTZ) ** ((height - 0.5 - y) / height);
      image.data.set(this.colours[level(bins, (hertz / highest) * bins.length)], 4 * y);
    }
    for (let column = 0; column < columns; column++) context.putImageData(image, x + column, 0);
  }
}

function level(bins, place) {
  const first = Math.min(bins.length - 1, Math.floor(place));
  const second = Math.min(bins.length - 1, first + 1);
  return Math.round(bins[first] + (bins[second] - bins[first]) * (place - first));
}

function mark(context, x) {
  context.fillStyle = "#7fd1ff";
  context.fillRect(x, 0, 2 * (window.devicePixelRatio || 1), context.canvas.height);
}

function colour(value) {
  const place = value * (STOPS.length - 1);
  const first = Math.min(STOPS.length - 2, Math.floor(place));
  return [0, 1, 2].map((i) => STOPS[first][i] + (STOPS[first + 1][i] - STOPS[first][i]) * (place - first)).concat(255);
}
