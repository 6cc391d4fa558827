// The model in the page: ONNX graphs run by onnxruntime-web's WebAssembly, on one thread.

function payload(name) {
  return document.getElementById(`payload-${name}`).textContent;
}

function decoded(base64) {
  if (Uint8Array.fromBase64) return Uint8Array.fromBase64(base64);
  const text = atob(base64);
  const bytes = new Uint8Array(text.length);
  for (let i = 0; i < text.length; i += 1) bytes[i] = text.charCodeAt(i);
  return bytes;
}

async function unpacked(name) {
  const stream = new Blob([decoded(payload(name))]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Uint8Array(await new Response(stream).arrayBuffer());
}

async function startRuntime() {
  const script = new Blob([await unpacked("runtime")], { type: "text/javascript" });
  const address = URL.createObjectURL(script);
  const ort = await import(address);
  URL.revokeObjectURL(address);
  ort.env.wasm.numThreads = 1; // a page from a disk has no SharedArrayBuffer
  ort.env.wasm.proxy = false;
  ort.env.wasm.wasmBinary = (await unpacked("wasm")).buffer;
  return ort;
}

// Load the graphs; returns functions from pixels (3 S S bytes) and ids to embeddings.
async function startEngine(about) {
  const ort = await startRuntime();
  const weights = joined(await unpacked("weights"), about.weights_bytes);
  const sessions = {};
  for (const [name, graph] of Object.entries(about.graphs)) {
    sessions[name] = await ort.InferenceSession.create(decoded(graph), {
      executionProviders: ["wasm"],
      externalData: [{ path: about.weights_path, data: weights }],
    });
  }
  const side = about.config.image_size;
  const image = (pixels) => ({ pixels: new ort.Tensor("uint8", pixels, [1, 3, side, side]) });
  const text = (ids) => ({
    input_ids: new ort.Tensor("int64", BigInt64Array.from(ids, BigInt), [1, ids.length]),
    attention_mask: new ort.Tensor("int64", new BigInt64Array(ids.length).fill(1n), [1, ids.length]),
  });
  let last = Promise.resolve();
  // One run at a time, as the runtime's memory is shared.
  const run = (name, inputs) => {
    const next = last.then(async () => (await sessions[name].run(inputs)).embedding.data);
    last = next.catch(() => undefined);
    return next;
  };
  return {
    text: (ids) => run("text", text(ids)),
    image: (pixels) => run("image", image(pixels)),
    patches: (pixels) => run("patches", image(pixels)),
    pair: sessions.image_text ? (pixels, ids) => run("image_text", { ...image(pixels), ...text(ids) }) : null,
  };
}
