// The page itself: search as you type, a chosen picture with its words, and a text added to it.

const SHOWN = 24;
const NEIGHBOURS = 12;
const HEAT_SIDE = 240;
const about = JSON.parse(payload("about"));
const byId = (id) => document.getElementById(id);
const state = { chosen: -1, word: "", shown: SHOWN };
const PLACES = [["top left", "top", "top right"], ["left", "centre", "right"], ["bottom left", "bottom", "bottom right"]];

// The model and everything that is computed with it; also at `explorer` in the browser's console.
const explorer = {
  about,
  texts: new Map(),
  patches: new Map(),

  async start() {
    this.tokenize = makeTokenizer(about.tokenizer, about.config.max_text_tokens);
    this.library = new Float32Array(joined(await unpacked("embeddings"), 4).buffer);
    this.pixels = await unpacked("pixels");
    this.engine = await startEngine(about);
    await this.embed("warm up");
  },

  // Read an image file as a picture of one's own, which is no part of the library; returns its index.
  async read(file) {
    const { pixels, source } = await readPicture(file, about.config.image_size, HEAT_SIDE);
    this.own = { pixels, source, caption: file.name, image: await this.engine.image(pixels) };
    this.patches.delete(about.pictures.length);
    return about.pictures.length;
  },

  pictureAt(index) {
    return about.pictures[index] ?? this.own;
  },

  pixelsOf(index) {
    if (index === about.pictures.length) return this.own.pixels;
    const size = 3 * about.config.image_size ** 2;
    return this.pixels.slice(index * size, (index + 1) * size);
  },

  imageOf(index) {
    if (index === about.pictures.length) return this.own.image;
    return this.library.slice(index * about.config.embed_dim, (index + 1) * about.config.embed_dim);
  },

  async embed(text) {
    const ids = this.tokenize(text);
    const key = ids.join(" ");
    if (!this.texts.has(key)) {
      if (this.texts.size > 500) this.texts.clear();
      this.texts.set(key, await this.engine.text(ids));
    }
    return this.texts.get(key);
  },

  // Whether no word of a text is in the model's vocabulary, so that it embeds all such texts of a length alike.
  knowsNothingOf(text) {
    const { vocab, unk_token } = about.tokenizer.model;
    return this.tokenize(text).every((id) => id === vocab[unk_token]);
  },

  // Rank the pictures for a text.
  async search(text, count = 10) {
    return ranked(await this.embed(text), this.library, count);
  },

  // Rank the other pictures for a picture with a text: "pass" is F(I,T), "sum" F(I) + F(T); without text by F(I).
  async compose(index, text, how = "pass", count = 10) {
    const image = this.imageOf(index);
    if (!text.trim()) return ranked(image, this.library, count, index);
    if (how === "pass" && this.engine.pair) {
      const query = await this.engine.pair(this.pixelsOf(index), this.tokenize(text));
      return ranked(query, this.library, count, index);
    }
    const words = await this.embed(text);
    return ranked(unit(image.map((value, i) => value + words[i])), this.library, count, index);
  },

  // Where a text is in a picture: the share of each patch, row by row, and a map of `side` x `side` in [0, 1].
  async heat(index, text, side = HEAT_SIDE) {
    if (!this.patches.has(index)) {
      if (this.patches.size > 100) this.patches.clear();
      this.patches.set(index, await this.engine.patches(this.pixelsOf(index)));
    }
    const shares = patchShares(this.patches.get(index), await this.embed(text));
    return { shares, map: heatMap(shares, side) };
  },
};
window.explorer = explorer;

function element(kind, attributes = {}, ...children) {
  const made = Object.assign(document.createElement(kind), attributes);
  made.append(...children);
  return made;
}

function pictureButton({ index, score }) {
  const picture = about.pictures[index];
  const button = element(
    "button",
    { type: "button", className: "picture", title: picture.caption },
    element("img", { src: picture.source, alt: "", width: 64, height: 64, loading: "lazy" }),
    element("span", { className: "caption", textContent: picture.caption }),
  );
  if (score !== undefined) button.append(element("span", { className: "score", textContent: score.toFixed(2) }));
  button.dataset.index = index;
  button.setAttribute("aria-pressed", String(index === state.chosen));
  button.addEventListener("click", () => choose(index, true));
  return element("li", {}, button);
}

function show(list, found) {
  list.replaceChildren(...found.map(pictureButton));
}

// Call `work` for the newest request alone: what is asked for meanwhile waits, and only the last of it is done.
function latest(work) {
  let running = false;
  let waiting = false;
  return async function again() {
    if (running) {
      waiting = true;
      return;
    }
    running = true;
    try {
      do {
        waiting = false;
        await work();
      } while (waiting);
    } finally {
      running = false;
    }
  };
}

const search = latest(async () => {
  const text = byId("query").value.trim();
  const total = about.pictures.length;
  byId("more").hidden = state.shown >= total;
  if (!text) {
    const every = Math.max(1, Math.floor(total / state.shown));
    const some = about.pictures.map((_, index) => ({ index })).filter(({ index }) => index % every === 0);
    show(byId("results"), some.slice(0, state.shown));
    byId("found").textContent = "Some of the pictures";
    byId("status").textContent = `${total.toLocaleString("en")} pictures, ready`;
  } else {
    const begun = performance.now();
    const found = await explorer.search(text, state.shown);
    const took = performance.now() - begun;
    show(byId("results"), found);
    byId("found").textContent = `Nearest to “${brief(text)}”`;
    const unknown = explorer.knowsNothingOf(text) ? "; the model knows no word of this text" : "";
    byId("status").textContent =
      `${found.length} of ${total.toLocaleString("en")} pictures in ${Math.max(1, Math.round(took))} ms${unknown}`;
  }
  showWords();
  remember();
});

const compose = latest(async () => {
  if (state.chosen < 0) return;
  const text = byId("added").value.trim();
  const how = document.querySelector("input[name=how]:checked")?.value ?? "sum";
  show(byId("neighbours"), await explorer.compose(state.chosen, text, how, NEIGHBOURS));
  byId("composed").textContent = text ? `Nearest to this picture with “${brief(text)}”` : "Nearest to this picture";
  showWords();
  remember();
});

const paint = latest(async () => {
  const canvas = byId("heat");
  const context = canvas.getContext("2d");
  const { chosen, word } = state;
  for (const chip of byId("words").children) chip.setAttribute("aria-pressed", String(chip.textContent === word));
  if (chosen < 0 || !word) {
    context.clearRect(0, 0, canvas.width, canvas.height);
    byId("where").textContent = "Point at a word, or move to it with Tab.";
    return;
  }
  const { shares, map } = await explorer.heat(chosen, word);
  if (state.chosen !== chosen) return;
  context.putImageData(new ImageData(heatColours(map), HEAT_SIDE, HEAT_SIDE), 0, 0);
  const side = Math.round(Math.sqrt(shares.length));
  const best = shares.indexOf(Math.max(...shares));
  const third = (place) => Math.min(2, Math.floor((3 * (place + 0.5)) / side));
  const place = PLACES[third(Math.floor(best / side))][third(best % side)];
  const share = percent(shares[best]);
  const even = percent(1 / shares.length);
  byId("where").textContent = `“${brief(word)}” is strongest at the ${place}: ${share} % in one patch, where an even share is ${even} %.`;
});

function light(word) {
  if (state.word === word) return;
  state.word = word;
  paint();
  remember();
}

// A text as a heading or a sentence shows it: what somebody pastes may be a book.
function brief(text) {
  const letters = Array.from(text.slice(0, 200));
  return letters.length > 60 ? `${letters.slice(0, 59).join("")}…` : text;
}

function percent(share) {
  return share < 0.095 ? (100 * share).toFixed(1) : String(Math.round(100 * share));
}

function wordsOf(text) {
  return text.split(/\s+/).filter(Boolean);
}

function showWords() {
  if (state.chosen < 0) return;
  const caption = about.pictures[state.chosen]?.caption ?? "";
  const words = [...wordsOf(caption), ...wordsOf(byId("added").value), ...wordsOf(byId("query").value)];
  const wanted = [...new Set(words)].slice(0, 24);
  const list = byId("words");
  if (wanted.join("\n") === Array.from(list.children, (chip) => chip.textContent).join("\n")) return;
  list.replaceChildren(
    ...wanted.map((word) => {
      const chip = element("button", { type: "button", className: "chip", textContent: word });
      chip.setAttribute("aria-pressed", String(word === state.word));
      chip.addEventListener("pointerenter", () => light(word));
      chip.addEventListener("focus", () => light(word));
      chip.addEventListener("click", () => light(word));
      return chip;
    }),
  );
}

function choose(index, byHand) {
  state.chosen = index;
  state.word = "";
  const open = index >= 0;
  byId("chosen").classList.toggle("open", open);
  byId("inside").hidden = !open;
  byId("invitation").hidden = open;
  document.body.classList.toggle("choosing", open);
  for (const button of document.querySelectorAll("button.picture")) {
    button.setAttribute("aria-pressed", String(Number(button.dataset.index) === index));
  }
  if (open) {
    const picture = explorer.pictureAt(index);
    byId("caption").textContent = picture.caption;
    byId("picture").src = picture.source;
    byId("picture").alt = picture.caption;
    byId("words").replaceChildren();
    showWords();
    light(byId("words").firstChild?.textContent ?? "");
    compose();
    if (byHand && matchMedia("(max-width: 860px)").matches) byId("chosen").scrollIntoView({ block: "start" });
  }
  paint();
  remember();
}

// Keep what is shown in the address, so that it can be kept as a bookmark; not at each letter, which some browsers refuse.
let remembering = 0;
function remember() {
  clearTimeout(remembering);
  remembering = setTimeout(() => {
    const picture = state.chosen in about.pictures ? state.chosen : "";
    const values = { q: byId("query").value, picture, add: byId("added").value, word: state.word };
    const given = Object.entries(values).filter(([, value]) => value !== "");
    history.replaceState(null, "", given.length ? `#${new URLSearchParams(given)}` : location.pathname + location.search);
  }, 400);
}

async function recall() {
  const given = new URLSearchParams(location.hash.slice(1));
  byId("query").value = given.get("q") ?? "";
  byId("added").value = given.get("add") ?? "";
  await search();
  const index = Number(given.get("picture") ?? -1);
  const word = given.get("word");
  if (index in about.pictures) choose(index, false);
  if (word) light(word);
}

async function takeOwn(file) {
  if (!file) return;
  try {
    choose(await explorer.read(file), true);
  } catch (error) {
    byId("status").textContent = `${file.name} could not be read as a picture (${error.message ?? error}).`;
  }
}

function listen() {
  const typed = () => {
    state.shown = SHOWN;
    search();
  };
  byId("query").addEventListener("input", typed);
  byId("added").addEventListener("input", compose);
  for (const how of document.querySelectorAll("input[name=how]")) how.addEventListener("change", compose);
  for (const form of document.querySelectorAll("form")) form.addEventListener("submit", (event) => event.preventDefault());
  byId("more").addEventListener("click", () => {
    state.shown *= 2;
    search();
  });
  byId("own").addEventListener("change", () => {
    takeOwn(byId("own").files[0]);
    byId("own").value = "";
  });
  document.addEventListener("dragover", (event) => event.preventDefault());
  document.addEventListener("drop", (event) => {
    event.preventDefault();
    takeOwn(event.dataTransfer.files[0]);
  });
  byId("leave").addEventListener("click", () => {
    choose(-1, true);
    byId("query").focus();
  });
  for (const chip of document.querySelectorAll("#examples button")) {
    chip.addEventListener("click", () => {
      byId("query").value = chip.textContent;
      typed();
    });
  }
}

explorer.ready = (async () => {
  try {
    await explorer.start();
    byId("how").hidden = !explorer.engine.pair;
    for (const input of document.querySelectorAll("input, #examples button")) input.disabled = false;
    listen();
    await recall();
    document.body.classList.add("ready");
  } catch (error) {
    byId("status").textContent = `The model could not be started in this browser (${error.message ?? error}).`;
    byId("status").classList.add("failed");
    throw error;
  }
})();
