// WordPiece as the library computes it: BERT's normaliser and splitting, then the longest piece first.

const WHITE = /\p{White_Space}/u;
const CONTROL = /[\p{Cc}\p{Cf}\p{Co}\p{Cs}]/u;
const PUNCTUATION = /[!-\/:-@\[-`{-~\p{P}]/u;
const ACCENT = /\p{Mn}/gu;
const IDEOGRAPHS = [
  [0x4e00, 0x9fff], [0x3400, 0x4dbf], [0x20000, 0x2a6df], [0x2a700, 0x2b73f], [0x2b740, 0x2b81f],
  [0x2b920, 0x2ceaf], [0xf900, 0xfaff], [0x2f800, 0x2fa1f],
];
const LONGEST_WORD = 100; // in characters; a longer word is unknown

function lowered(text) {
  return Array.from(text, (letter) => letter.toLowerCase()).join("");
}

function cleaned(text) {
  let out = "";
  for (const letter of text) {
    if (letter === "\ufffd" || (CONTROL.test(letter) && !/[\t\n\r]/.test(letter))) continue;
    out += WHITE.test(letter) ? " " : letter;
  }
  return out;
}

function spacedIdeographs(text) {
  const isOne = (code) => IDEOGRAPHS.some(([first, last]) => first <= code && code <= last);
  return Array.from(text, (letter) => (isOne(letter.codePointAt(0)) ? ` ${letter} ` : letter)).join("");
}

function normalised(text, settings) {
  if (!settings) return text;
  switch (settings.type) {
    case "BertNormalizer": {
      if (settings.clean_text) text = cleaned(text);
      if (settings.handle_chinese_chars) text = spacedIdeographs(text);
      if (settings.strip_accents ?? settings.lowercase) text = text.normalize("NFD").replace(ACCENT, "");
      return settings.lowercase ? lowered(text) : text;
    }
    case "Sequence":
      return settings.normalizers.reduce(normalised, text);
    case "Lowercase":
      return lowered(text);
    case "StripAccents":
      return text.replace(ACCENT, "");
    case "Strip": {
      if (settings.strip_left) text = text.replace(/^\p{White_Space}+/u, "");
      return settings.strip_right ? text.replace(/\p{White_Space}+$/u, "") : text;
    }
    default:
      return text.normalize(settings.type); // NFC, NFD, NFKC, NFKD
  }
}

function splitWords(text) {
  const words = [];
  let word = "";
  for (const letter of text) {
    const alone = PUNCTUATION.test(letter);
    if (!alone && !WHITE.test(letter)) {
      word += letter;
      continue;
    }
    if (word) words.push(word);
    word = "";
    if (alone) words.push(letter);
  }
  if (word) words.push(word);
  return words;
}

// Return a function from a text to its ids, given the contents of tokenizer.json.
function makeTokenizer(settings, maxTokens) {
  const vocabulary = new Map(Object.entries(settings.model.vocab));
  const unknown = vocabulary.get(settings.model.unk_token);

  function pieces(word) {
    const letters = Array.from(word);
    if (letters.length > LONGEST_WORD) return [unknown];
    const found = [];
    for (let start = 0; start < letters.length; ) {
      let end = letters.length;
      let id;
      for (; end > start; end -= 1) {
        id = vocabulary.get((start ? "##" : "") + letters.slice(start, end).join(""));
        if (id !== undefined) break;
      }
      if (id === undefined) return [unknown];
      found.push(id);
      start = end;
    }
    return found;
  }

  return (text) => {
    // Each word has an id at least, so that no more words than ids are needed of a pasted book.
    const ids = splitWords(normalised(text, settings.normalizer)).slice(0, maxTokens).flatMap(pieces);
    return ids.length ? ids.slice(0, maxTokens) : [unknown];
  };
}
