// Runs the painter beside the page, so that the page stays alive while the processor works.
// Hears { caption, seed, steps, guidance }; says { loaded }, { step, picture }, { done } or { error }.
import * as ort from "./ort.wasm.min.mjs";
import { Painter } from "./painter.js";

ort.env.wasm.numThreads = 1;  // more threads need headers that plain servers don't send
ort.env.wasm.wasmPaths = new URL(".", import.meta.url).href;

let painter = null;

self.onmessage = async ({ data }) => {
  try {
    painter ??= await Painter.load(ort, new URL("models", import.meta.url).href, (loaded) => self.postMessage({ loaded }));
    for await (const { step, guess } of painter.paint(data.caption, data)) {
      self.postMessage({ step, picture: await painter.decode(guess) });
    }
    self.postMessage({ done: true });
  } catch (error) {
    self.postMessage({ error: error.message });
  }
};
