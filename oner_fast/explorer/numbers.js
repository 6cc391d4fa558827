// The arithmetic of the page: embeddings, ranking, and maps of a word over the patches.

const TEMPERATURE = 0.2; // divides the cosines of patches before their softmax
// Red, green, blue (0 to 255) and opacity, from low to high: clear, amber, orange, deep red.
const RAMP = [
  [255, 237, 168, 0.0], [255, 209, 102, 0.3], [250, 148, 51, 0.62], [224, 69, 38, 0.8], [140, 13, 41, 0.88],
];

// Join numbers of `width` bytes whose first bytes, second bytes, ... were stored apart, as they pack better so.
function joined(planes, width) {
  const count = planes.length / width;
  const out = new Uint8Array(planes.length);
  for (let plane = 0; plane < width; plane += 1) {
    for (let i = 0; i < count; i += 1) out[i * width + plane] = planes[plane * count + i];
  }
  return out;
}

function dot(a, aStart, b, bStart, width) {
  let sum = 0;
  for (let i = 0; i < width; i += 1) sum += a[aStart + i] * b[bStart + i];
  return sum;
}

function unit(vector) {
  const length = Math.max(Math.sqrt(dot(vector, 0, vector, 0, vector.length)), 1e-12);
  return vector.map((value) => value / length);
}

// Rank the rows of a library by their cosine with a query: the first `count` as {index, score}, without `left`.
function ranked(query, library, count, left = -1) {
  const width = query.length;
  const found = [];
  for (let index = 0; index < library.length / width; index += 1) {
    if (index !== left) found.push({ index, score: dot(query, 0, library, index * width, width) });
  }
  return found.sort((one, other) => other.score - one.score || one.index - other.index).slice(0, count);
}

// Share of each patch: the softmax over patches of cosine / temperature.
function patchShares(patches, text) {
  const width = text.length;
  const logits = [];
  for (let start = 0; start < patches.length; start += width) {
    logits.push(dot(patches, start, text, 0, width) / TEMPERATURE);
  }
  const most = Math.max(...logits);
  const weights = logits.map((value) => Math.exp(value - most));
  const total = weights.reduce((sum, value) => sum + value, 0);
  return weights.map((value) => value / total);
}

function cubic(distance) {
  const x = Math.abs(distance);
  const a = -0.75;
  if (x <= 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? ((a * x - 5 * a) * x + 8 * a) * x - 4 * a : 0;
}

// Weights by which `size` places read a row of `cells`, enlarged by cubic interpolation.
function cubicWeights(cells, size) {
  return Array.from({ length: size }, (_, place) => {
    const centre = ((place + 0.5) * cells) / size - 0.5;
    const first = Math.floor(centre) - 1;
    const weights = new Float64Array(cells);
    for (let step = 0; step < 4; step += 1) {
      weights[Math.min(Math.max(first + step, 0), cells - 1)] += cubic(centre - first - step);
    }
    return weights;
  });
}

// Enlarge the shares of a square grid to size x size, stretched to [0, 1]; all 0 where the shares are equal.
function heatMap(shares, size) {
  const cells = Math.round(Math.sqrt(shares.length));
  const high = Math.max(...shares);
  const out = new Float32Array(size * size);
  if (high - Math.min(...shares) <= 1e-6 * high) return out;
  const weights = cubicWeights(cells, size);
  let least = Infinity;
  let most = -Infinity;
  for (let row = 0; row < size; row += 1) {
    const line = new Float64Array(cells);
    for (let down = 0; down < cells; down += 1) {
      for (let across = 0; across < cells; across += 1) line[across] += weights[row][down] * shares[down * cells + across];
    }
    for (let column = 0; column < size; column += 1) {
      const value = dot(weights[column], 0, line, 0, cells);
      out[row * size + column] = value;
      least = Math.min(least, value);
      most = Math.max(most, value);
    }
  }
  return out.map((value) => (value - least) / Math.max(most - least, 1e-12));
}

// Colours of a heat map as RGBA bytes.
function heatColours(heat) {
  const out = new Uint8ClampedArray(heat.length * 4);
  heat.forEach((value, place) => {
    const at = Math.min(Math.max(value, 0), 1) * (RAMP.length - 1);
    const lower = Math.min(Math.floor(at), RAMP.length - 2);
    for (let channel = 0; channel < 4; channel += 1) {
      const colour = RAMP[lower][channel] * (1 - at + lower) + RAMP[lower + 1][channel] * (at - lower);
      out[place * 4 + channel] = channel === 3 ? colour * 255 : colour;
    }
  });
  return out;
}
