// The sound of a stream: 16-bit samples in, through an AudioWorklet to the loudspeakers and an analyser.

export class Player {
  // onReport gets the worklet's reports of the present epoch.
  constructor(onReport) {
    this.onReport = onReport;
    this.epoch = 0;
    this.volume = 0.8;
  }

  // Make the audio graph for a sample rate; must be called from a click or a key, or the browser stays silent.
  async prepare(sampleRate) {
    if (this.context && this.context.sampleRate !== sampleRate) {
      await this.context.close();
      this.context = null;
    }
    if (!this.context) {
      this.context = new AudioContext({ sampleRate, latencyHint: "interactive" });
      await this.context.audioWorklet.addModule("static/worklet.js");
      this.node = new AudioWorkletNode(this.context, "player", { numberOfInputs: 0, outputChannelCount: [2] });
      this.node.port.onmessage = ({ data }) => data.epoch === this.epoch && this.onReport(data);
      this.analyser = new AnalyserNode(this.context, { fftSize: 2048, smoothingTimeConstant: 0, minDecibels: -95, maxDecibels: -25 });
      this.gain = new GainNode(this.context, { gain: this.volume });
      this.node.connect(this.analyser).connect(this.gain).connect(this.context.destination);
    }
    await this.context.resume();
  }

  // Forget what is not heard yet and begin anew.
  begin(epoch, channels, startSeconds) {
    this.epoch = epoch;
    this.channels = channels;
    this.node.port.postMessage({ reset: true, epoch, startSeconds });
  }

  push(buffer) {
    const samples = new Int16Array(buffer);
    const length = samples.length / this.channels;
    const channels = Array.from({ length: this.channels }, () => new Float32Array(length));
    channels.forEach((channel, index) => {
      for (let i = 0; i < length; i++) channel[i] = samples[i * this.channels + index] / 32768;
    });
    this.node.port.postMessage({ epoch: this.epoch, channels }, channels.map((channel) => channel.buffer));
  }

  // How much audio there must be before the sound begins, or begins again.
  wait(startSeconds) {
    this.node.port.postMessage({ epoch: this.epoch, startSeconds });
  }

  end() {
    this.node.port.postMessage({ epoch: this.epoch, end: true });
  }

  stop() {
    if (this.node) this.begin(-1, 1, 0);
  }

  setVolume(volume) {
    this.volume = volume;
    if (this.gain) this.gain.gain.setTargetAtTime(volume, this.context.currentTime, 0.02);
  }
}
