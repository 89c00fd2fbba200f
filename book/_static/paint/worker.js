// Runs the painter beside the page, so that the page stays alive while the processor works.
// Hears { caption, seed, steps, guidance }; says { loaded }, { step, picture }, { done, meter } or { error }.
// Hears { judge: true }; says { loaded }, { similarity, own, others } about the last picture, or { error }.
import * as ort from "./ort.wasm.min.mjs";
import { Painter } from "./painter.js";

ort.env.wasm.numThreads = 1;  // more threads need headers that plain servers don't send
ort.env.wasm.wasmPaths = new URL(".", import.meta.url).href;

const MODELS = new URL("models", import.meta.url).href;
let painter = null, last = null;

const loading = (loaded) => self.postMessage({ loaded });

async function judge() {
  const similarity = await painter.similarity(last.picture, last.caption, MODELS, loading);
  self.postMessage({ similarity, own: painter.facts.meter.own, others: painter.facts.meter.others });
}

self.onmessage = async ({ data }) => {
  try {
    if (data.judge) return await judge();
    painter ??= await Painter.load(ort, MODELS, loading);
    for await (const { step, guess } of painter.paint(data.caption, data)) {
      last = { caption: data.caption, picture: await painter.decode(guess) };
      self.postMessage({ step, picture: last.picture });
    }
    self.postMessage({ done: true, meter: painter.facts.meter.size });
  } catch (error) {
    self.postMessage({ error: error.message });
  }
};
