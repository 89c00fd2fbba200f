// The miniature Stable Diffusion in a browser: the same words, noise, steps and pictures as
// StableDiffusion.from_pretrained("emoji") in Python. No part of this file knows about the page.

const BEGIN = "<|startoftext|>", END = "<|endoftext|>", END_OF_WORD = "</w>";
const WORDS = /<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+/giu;

// --- words: chapter 13 ---------------------------------------------------------------------------

/** One visible character for each of the 256 bytes, in CLIP's order. */
function byteSymbols() {
  const range = (from, to) => Array.from({ length: to - from + 1 }, (_, i) => from + i);
  const visible = [...range(33, 126), ...range(161, 172), ...range(174, 255)];
  const symbols = Array.from({ length: 256 });
  visible.forEach((byte) => { symbols[byte] = String.fromCharCode(byte); });
  range(0, 255).filter((byte) => !symbols[byte]).forEach((byte, i) => { symbols[byte] = String.fromCharCode(256 + i); });
  return symbols;
}

/** Byte-pair encoding: a caption becomes a row of ids, as `text.Tokenizer` makes it. */
export class Tokenizer {
  constructor({ vocabulary, merges, length, pad }) {
    Object.assign(this, { vocabulary, length, pad, symbols: byteSymbols() });
    this.rank = new Map(merges.map((pair, i) => [pair, i]));
  }

  encodeWord(word) {
    if (word === BEGIN || word === END) return [this.vocabulary[word]];
    let symbols = Array.from(new TextEncoder().encode(word), (byte) => this.symbols[byte]);
    symbols[symbols.length - 1] += END_OF_WORD;
    for (;;) {
      const ranks = symbols.slice(1).map((symbol, i) => this.rank.get(`${symbols[i]} ${symbol}`) ?? Infinity);
      const best = Math.min(Infinity, ...ranks);
      if (best === Infinity) return symbols.map((symbol) => this.vocabulary[symbol]);
      const merged = [];
      for (let i = 0; i < symbols.length; i++) {  // every occurrence of the best pair, from left to right
        const glue = i + 1 < symbols.length && this.rank.get(`${symbols[i]} ${symbols[i + 1]}`) === best;
        merged.push(glue ? symbols[i] + symbols[++i] : symbols[i]);
      }
      symbols = merged;
    }
  }

  /** The ids of a caption: begin, words, end, padding; what doesn't fit is cut off. */
  encode(caption) {
    const straight = caption.normalize("NFC").replace(/[\u02bc\u2018-\u201b]/g, "'").replace(/[\u201c-\u201f]/g, '"');
    const text = straight.replace(/\s+/gu, " ").trim().toLowerCase();
    const ids = (text.match(WORDS) ?? []).flatMap((word) => this.encodeWord(word)).slice(0, this.length - 2);
    const row = new Array(this.length).fill(this.pad);
    [this.vocabulary[BEGIN], ...ids, this.vocabulary[END]].forEach((id, i) => { row[i] = id; });
    return row;
  }
}

// --- noise: the numbers that torch.randn draws ---------------------------------------------------

/** The Mersenne twister (Matsumoto & Nishimura 1998), seeded as PyTorch seeds it: a function that draws 32 bits. */
function mersenneTwister(seed) {
  const state = new Uint32Array(624);
  state[0] = seed;
  for (let i = 1; i < 624; i++) state[i] = Math.imul(1812433253, state[i - 1] ^ (state[i - 1] >>> 30)) + i;
  let next = 624;
  return () => {
    if (next === 624) {
      for (let i = 0; i < 624; i++) {
        const y = (state[i] & 0x80000000) | (state[(i + 1) % 624] & 0x7fffffff);
        state[i] = state[(i + 397) % 624] ^ (y >>> 1) ^ (y & 1 ? 0x9908b0df : 0);
      }
      next = 0;
    }
    let y = state[next++];
    y ^= y >>> 11;
    y ^= (y << 7) & 0x9d2c5680;
    y ^= (y << 15) & 0xefc60000;
    return (y ^ (y >>> 18)) >>> 0;
  };
}

/** torch.randn(count, generator=torch.Generator().manual_seed(seed)), for a count that is a multiple of 16. */
export function standardNormal(seed, count) {
  const draw = mersenneTwister(seed), values = new Float32Array(count);
  for (let i = 0; i < count; i++) values[i] = (draw() & 0xffffff) / 0x1000000;  // 24 bits: uniform in [0, 1)
  for (let i = 0; i < count; i += 16) {
    for (let j = i; j < i + 8; j++) {  // Box and Muller's transform, for eight pairs at a time
      const radius = Math.sqrt(-2 * Math.log(1 - values[j])), angle = 2 * Math.PI * values[j + 8];
      values[j] = radius * Math.cos(angle);
      values[j + 8] = radius * Math.sin(angle);
    }
  }
  return values;
}

// --- steps: chapters 04 and 09 -------------------------------------------------------------------

/** Python's round: halves go to the even neighbour. */
function roundHalfToEven(x) {
  const low = Math.floor(x);
  return x - low === 0.5 ? low + (low % 2) : Math.round(x);
}

/** The times of `steps` trailing steps, from the last of `total` down. */
export function timesteps(total, steps) {
  return Array.from({ length: steps }, (_, i) => roundHalfToEven(total - (i * total) / steps) - 1);
}

/** How the clean picture (x0) follows from what the network says, by what it was trained to say. */
const CLEAN = {
  epsilon: (x, answer, alpha, sigma) => (x - sigma * answer) / alpha,
  x0: (x, answer) => answer,
  v: (x, answer, alpha, sigma) => alpha * x - sigma * answer,
};

// --- the painter: chapter 19 ---------------------------------------------------------------------

/** Fetch a file and tell `onProgress(bytes)` about each piece that arrives. */
async function fetchBytes(url, onProgress) {
  const response = await fetch(url);
  if (!response.ok) throw new Error(`${url.split("/").pop()} could not be loaded (${response.status})`);
  const pieces = [], reader = response.body.getReader();
  for (let piece = await reader.read(); !piece.done; piece = await reader.read()) {
    pieces.push(piece.value);
    onProgress(piece.value.length);
  }
  return new Uint8Array(await new Blob(pieces).arrayBuffer());
}

/** Unpack gzip, unless the server did so already. */
async function unpack(bytes) {
  if (bytes[0] !== 0x1f || bytes[1] !== 0x8b) return bytes;
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

/** ONNX Runtime Web: the build that can use the graphics processor, or the smaller one that can't. */
async function loadRuntime(folder, gpu) {
  const ort = await import(`${folder}/ort.${gpu ? "webgpu" : "wasm"}.min.mjs`);
  const engine = `${folder}/ort-wasm-simd-threaded${gpu ? ".asyncify" : ""}`;
  ort.env.logLevel = "error";
  ort.env.wasm.numThreads = 1;  // more threads need headers that plain servers don't send
  ort.env.wasm.wasmPaths = { mjs: `${engine}.mjs` };
  ort.env.wasm.wasmBinary = await unpack(await fetchBytes(`${engine}.wasm.gz`, () => {}));
  return ort;
}

export class Painter {
  /**
   * Load the runtime from a folder, and the networks from `models` in it, to run on the graphics processor or not.
   * `onProgress` hears the share of the networks that has arrived, from 0 to 1.
   */
  static async load(home, { gpu = false, onProgress = () => {} } = {}) {
    const painter = new Painter(), folder = `${home}/models`;
    Object.assign(painter, { folder, gpu, ort: await loadRuntime(home, gpu) });
    painter.facts = await (await fetch(`${folder}/painter.json`)).json();
    painter.tokenizer = new Tokenizer(painter.facts);
    const total = Object.values(painter.facts.sizes).reduce((a, b) => a + b);
    let arrived = 0;
    for (const name of Object.keys(painter.facts.sizes)) {
      const bytes = await fetchBytes(`${folder}/${name}.onnx`, (count) => onProgress((arrived += count) / total));
      painter[name] = await painter.session(bytes);
    }
    return painter;
  }

  session(bytes) {
    return this.ort.InferenceSession.create(bytes, { executionProviders: this.gpu ? ["webgpu", "wasm"] : ["wasm"] });
  }

  async run(network, inputs) {
    const tensors = Object.fromEntries(Object.entries(inputs).map(
      ([name, [data, ...shape]]) => [name, new this.ort.Tensor(data instanceof BigInt64Array ? "int64" : "float32", data, shape)],
    ));
    const outputs = await this[network].run(tensors);
    return outputs[this[network].outputNames[0]].data;
  }

  /** What the U-Net is told: the vectors of the caption, then those of the empty one. */
  async encode(caption) {
    const ids = [caption, ""].flatMap((text) => this.tokenizer.encode(text));
    return this.run("text_encoder", { ids: [BigInt64Array.from(ids, BigInt), 2, this.tokenizer.length] });
  }

  /** A latent becomes a picture: red, green and blue of all pixels, each in [-1, 1]. */
  async decode(latent) {
    return this.run("decoder", { z: [latent, 1, ...this.facts.latent] });
  }

  /** How well a picture fits a caption, by the miniature CLIP (chapter 14), which is loaded when it is first asked. */
  async similarity(picture, caption, onProgress = () => {}) {
    if (!this.clip) {
      let arrived = 0;
      const hear = (count) => onProgress((arrived += count) / this.facts.meter.size);
      this.clip = await this.session(await fetchBytes(`${this.folder}/clip.onnx`, hear));
    }
    const [channels, side] = [3, Math.sqrt(picture.length / 3)];
    const [found] = await this.run("clip", {
      image: [picture.map((x) => Math.min(1, Math.max(-1, x))), 1, channels, side, side],
      ids: [BigInt64Array.from(this.tokenizer.encode(caption), BigInt), 1, this.tokenizer.length],
    });
    return found;
  }

  /** The guided guess of the clean latent at time t (classifier-free guidance, chapter 05). */
  async guess(x, t, context, guidance) {
    const { latent, alpha, sigma, prediction } = this.facts, size = x.length;
    const twice = new Float32Array(2 * size);
    twice.set(x);
    twice.set(x, size);
    const answer = await this.run("unet", {
      x: [twice, 2, ...latent], t: [Float32Array.of(t, t), 2],
      context: [context, 2, this.tokenizer.length, context.length / 2 / this.tokenizer.length],
    });
    const clean = (i, answer) => CLEAN[prediction](x[i], answer, alpha[t], sigma[t]);
    return Float32Array.from(x, (_, i) => {
      const asked = clean(i, answer[i]), without = clean(i, answer[i + size]);
      return without + guidance * (asked - without);
    });
  }

  /** Paint by DPM-Solver++(2M): after each step yields { step, guess }, the guess of the clean latent. */
  async *paint(caption, { seed = 0, steps = 20, guidance = 3, latent } = {}) {
    const { alpha, sigma } = this.facts;
    const context = await this.encode(caption);
    let x = latent ?? standardNormal(seed, this.facts.latent.reduce((a, b) => a * b));
    const times = timesteps(alpha.length, steps), lambda = times.map((t) => Math.log(alpha[t] / sigma[t]));
    let before = null;
    for (let i = 0; i < steps; i++) {
      const now = times[i], then = times[i + 1], h = lambda[i + 1] - lambda[i];
      const guess = await this.guess(x, now, context, guidance);
      if (then === undefined) {
        x = guess;  // to the clean point: there is no noise left to keep
      } else {
        const [slope, kept, added] = [before ? h / (2 * before.h) : 0, sigma[then] / sigma[now], alpha[then] * Math.expm1(-h)];
        const last = before?.guess ?? guess;
        x = x.map((value, j) => kept * value - added * (guess[j] + slope * (guess[j] - last[j])));
      }
      before = { h, guess };
      yield { step: i + 1, guess };
    }
  }
}
