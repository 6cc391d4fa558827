// A picture of one's own as the model sees it: resized as Pillow does (bicubic), and its centre cut out.
// Pillow 13 takes the two directions of a picture more than twice as high as wide in the other order, so that it rounds
// and clips such a picture otherwise.

const PRECISION = 2 ** 22; // Pillow's weights are whole multiples of its inverse

function pillowCubic(distance) {
  const x = Math.abs(distance);
  const a = -0.5;
  if (x < 1) return ((a + 2) * x - (a + 3)) * x * x + 1;
  return x < 2 ? (((x - 5) * x + 8) * x - 4) * a : 0;
}

function rounded(value) {
  const below = Math.floor(value);
  const rest = value - below;
  return rest === 0.5 ? below + (below % 2) : Math.round(value); // to even, as Python does
}

// First cell and weights by which each of `size` places reads a line of `cells`.
function pillowWeights(cells, size) {
  const scale = cells / size;
  const stretch = Math.max(scale, 1);
  const inverse = 1 / stretch; // a division instead of a product would round other weights
  return Array.from({ length: size }, (_, place) => {
    const centre = (place + 0.5) * scale;
    const first = Math.max(0, Math.trunc(centre - 2 * stretch + 0.5));
    const last = Math.min(cells, Math.trunc(centre + 2 * stretch + 0.5));
    const weights = [];
    for (let cell = first; cell < last; cell += 1) weights.push(pillowCubic((cell - centre + 0.5) * inverse));
    const total = weights.reduce((sum, value) => sum + value, 0);
    return { first, weights: weights.map((value) => Math.trunc((value / total) * PRECISION + (value < 0 ? -0.5 : 0.5))) };
  });
}

// Resize the columns of pixels (height, width, 4), of which the alpha is left out, and turn rows into columns.
function resizedAcross(pixels, width, height, size) {
  const out = new Uint8ClampedArray(size * height * 4);
  const lines = pillowWeights(width, size);
  for (let row = 0; row < height; row += 1) {
    lines.forEach(({ first, weights }, place) => {
      for (let channel = 0; channel < 3; channel += 1) {
        let sum = PRECISION / 2;
        for (let i = 0; i < weights.length; i += 1) sum += weights[i] * pixels[(row * width + first + i) * 4 + channel];
        out[(place * height + row) * 4 + channel] = Math.floor(sum / PRECISION);
      }
    });
  }
  return out;
}

// Turn pixels (height, width, 4) into bytes (3, side, side): the shorter side resized, and the centre square.
function modelPixels(pixels, width, height, side) {
  const shorter = Math.min(width, height);
  const wide = rounded((width * side) / shorter);
  const high = rounded((height * side) / shorter);
  const across = width === wide && height === high ? null : resizedAcross(pixels, width, height, wide); // (wide, height)
  const all = across ? resizedAcross(across, height, wide, high) : pixels; // (high, wide)
  const left = Math.floor((wide - side) / 2);
  const top = Math.floor((high - side) / 2);
  const out = new Uint8Array(3 * side * side);
  for (let row = 0; row < side; row += 1) {
    for (let column = 0; column < side; column += 1) {
      const at = ((row + top) * wide + column + left) * 4;
      for (let channel = 0; channel < 3; channel += 1) out[(channel * side + row) * side + column] = all[at + channel];
    }
  }
  return out;
}

// Read an image file: `pixels` for the model, and `source`, a data URI of its centre square.
async function readPicture(file, side, shownSide) {
  const bitmap = await createImageBitmap(file, { colorSpaceConversion: "none" });
  const canvas = Object.assign(document.createElement("canvas"), { width: bitmap.width, height: bitmap.height });
  const context = canvas.getContext("2d", { willReadFrequently: true });
  context.fillStyle = "white";
  context.fillRect(0, 0, canvas.width, canvas.height);
  context.drawImage(bitmap, 0, 0);
  const { data } = context.getImageData(0, 0, canvas.width, canvas.height);
  const shown = Object.assign(document.createElement("canvas"), { width: shownSide, height: shownSide });
  const square = Math.min(canvas.width, canvas.height);
  const [left, top] = [(canvas.width - square) / 2, (canvas.height - square) / 2];
  shown.getContext("2d").drawImage(canvas, left, top, square, square, 0, 0, shownSide, shownSide);
  return { pixels: modelPixels(data, canvas.width, canvas.height, side), source: shown.toDataURL() };
}
