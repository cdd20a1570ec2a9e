"use strict";
// Undoes sst_interp/report/packing.py: base64, gzip, planes of bytes, and codes of decimal numbers.
const pack = (() => {
  const bytes = (text) => {
    if (Uint8Array.fromBase64) return Uint8Array.fromBase64(text);
    const raw = atob(text), out = new Uint8Array(raw.length);
    for (let i = 0; i < raw.length; i++) out[i] = raw.charCodeAt(i);
    return out;
  };
  const inflate = (text) => new Response(new Blob([bytes(text)]).stream().pipeThrough(new DecompressionStream("gzip")));

  async function arrays(block) {
    const all = new Uint8Array(await inflate(block.gz).arrayBuffer()), found = {};
    let start = 0;
    for (const [name, n, size] of block.arrays) {
      const out = size === 1 ? new Uint8Array(n) : size === 2 ? new Uint16Array(n) : new Uint32Array(n);
      for (let s = 0; s < size; s++) {
        const plane = start + s * n, shift = 8 * s;
        for (let i = 0; i < n; i++) out[i] |= all[plane + i] << shift;
      }
      found[name] = out;
      start += n * size;
    }
    return found;
  }

  // Codes 0 and 1 are "no number" and 0; the others are decimals of a few significant digits.
  function decimals({ digits, low, high }) {
    const values = [NaN, 0], bounds = [], exponents = [NaN, NaN];
    for (let e = low - digits + 1; e <= high - digits; e++) {
      for (let m = 10 ** (digits - 1); m < 10 ** digits; m++) {
        values.push(Number(`${m}e${e}`));
        bounds.push(Number(`${m}.5e${e}`));
        exponents.push(e);
      }
    }
    bounds.pop();
    const code = (x) => {
      if (Number.isNaN(x)) return 0;
      if (!(x > 0)) return 1;
      let from = 0, to = bounds.length;
      while (from < to) {
        const middle = (from + to) >> 1;
        if (bounds[middle] < x) from = middle + 1; else to = middle;
      }
      return 2 + from;
    };
    const fixed = (c, x) => x.toFixed(Math.min(20, Math.max(0, -exponents[c])));
    return {
      values,
      code,
      text: (c) => c < 2 ? (c ? "0" : "–") : fixed(c, values[c]),
      oneMinus: (c) => c < 2 ? (c ? "1" : "–") : fixed(c, 1 - values[c]),
    };
  }

  return {
    supported: typeof DecompressionStream === "function",
    text: (gz) => inflate(gz).text(),
    arrays,
    decimals,
  };
})();

// An element with its attributes and children; text stays text.
function el(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) if (value !== null && value !== undefined && value !== false) node.setAttribute(name, value === true ? "" : value);
  node.append(...children.filter((child) => child !== null && child !== undefined));
  return node;
}
