// Plays chunks of samples as they arrive, in the audio thread. Waits for a little audio before it begins, and again
// when it has run out. Reports what was heard.

const REPORT_SECONDS = 0.05;

class Player extends AudioWorkletProcessor {
  constructor() {
    super();
    this.reset(0, 0.35);
    this.port.onmessage = ({ data }) => this.receive(data);
  }

  reset(epoch, startSeconds) {
    Object.assign(this, {
      epoch, startSeconds, chunks: [], offset: 0, buffered: 0, played: 0, underruns: 0, ended: false, playing: false,
      peak: 0, sinceReport: 0,
    });
  }

  receive(data) {
    if (data.reset) this.reset(data.epoch, data.startSeconds);
    else if (data.epoch !== this.epoch) return;
    else if (data.end) this.ended = true;
    else if (data.startSeconds) this.startSeconds = data.startSeconds;
    else {
      this.chunks.push(data.channels);
      this.buffered += data.channels[0].length;
    }
  }

  process(inputs, [output]) {
    const frames = output[0].length;
    if (!this.playing && this.buffered > 0) {
      this.playing = this.ended || this.buffered >= this.startSeconds * sampleRate;
    }
    const n = this.playing ? this.fill(output, frames) : 0;
    if (this.playing && n < frames) {
      this.playing = false;
      if (!this.ended) this.underruns += 1;
    }
    this.sinceReport += frames;
    if (this.sinceReport >= REPORT_SECONDS * sampleRate) this.report();
    return true;
  }

  fill(output, frames) {
    let n = 0;
    while (n < frames && this.chunks.length) {
      const chunk = this.chunks[0];
      const length = Math.min(frames - n, chunk[0].length - this.offset);
      output.forEach((channel, index) => {
        const part = chunk[Math.min(index, chunk.length - 1)].subarray(this.offset, this.offset + length);
        channel.set(part, n);
        if (index === 0) for (const x of part) this.peak = Math.max(this.peak, Math.abs(x));
      });
      n += length;
      this.offset += length;
      if (this.offset === chunk[0].length) {
        this.chunks.shift();
        this.offset = 0;
      }
    }
    this.buffered -= n;
    this.played += n;
    return n;
  }

  report() {
    this.port.postMessage({
      epoch: this.epoch, played: this.played / sampleRate, buffered: this.buffered / sampleRate,
      underruns: this.underruns, playing: this.playing, done: this.ended && this.buffered === 0, peak: this.peak,
    });
    this.peak = 0;
    this.sinceReport = 0;
  }
}

registerProcessor("player", Player);
