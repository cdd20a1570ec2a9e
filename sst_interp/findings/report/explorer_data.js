"use strict";
// One comparison of the explorer's data: where a cell's numbers stand, and how they read.
const explorerData = (data) => {
  const distance = pack.decimals(data.codes.distance), size = pack.decimals(data.codes.size);
  const output = pack.decimals(data.codes.output);
  const opened = new Map();

  async function open(index) {
    if (opened.has(index)) return opened.get(index);
    const made = pack.arrays(data.comparisons[index].block).then((arrays) => comparison(data.comparisons[index], arrays));
    opened.set(index, made);
    return made;
  }

  function comparison(info, arrays) {
    const chained = (names) => names.slice(1).forEach((name, i) => {
      const before = arrays[names[i]], now = arrays[name];
      if (!now) return;  // the second of two runs has its overlaps alone
      for (let k = 0; k < now.length; k++) now[k] += before[k];
    });
    chained(info.states.map((n) => `norm.${n}`));
    chained(info.pairs.map(([a, b]) => `cosine.${a}.${b}`));
    chained(info.states.map((n) => `lens.${n}`).filter((name) => arrays[name]));
    const starts = [0];
    info.lengths.forEach((n) => starts.push(starts.at(-1) + n));
    const L = info.layers.length;
    const at = (q, layer, position) => starts[q] * L + layer * info.lengths[q] + position;
    const norm = (n, i) => arrays[`norm.${n}`][i];

    function l2(a, b, i) {
      const stored = arrays[`relative_l2.${a}.${b}`];
      if (!stored) return 0;
      const s = size.values[norm(b, i)] / size.values[norm(a, i)], d = distance.values[arrays[`cosine.${a}.${b}`][i]];
      return (stored[i] + distance.code(Math.sqrt((1 - s) * (1 - s) + 2 * s * d))) & 65535;
    }

    // Codes of 1 - overlap, in the run's choice of overlap.
    function overlap(a, b, i) {
      const cosine = arrays[`cosine.${a}.${b}`][i];
      if (!cosine) return 0;
      if (data.overlap === "relative_l2") return l2(a, b, i);
      return data.overlap === "lens_jaccard" ? arrays[`lens_jaccard.${a}.${b}`][i] : cosine;
    }

    function cell(q, layer, position, [a, b]) {
      const i = at(q, layer, position), there = arrays[`cosine.${a}.${b}`][i] > 0;
      if (!there) return null;
      const o = overlap(a, b, i), r = l2(a, b, i);
      return {
        distance: distance.values[o], overlap: distance.oneMinus(o), l2: r ? distance.text(r) : null,
        normA: size.text(norm(a, i)), normB: size.text(norm(b, i)), ratio: size.values[norm(b, i)] / size.values[norm(a, i)],
      };
    }

    // The number that a map colours, per cell [layer][position]; NaN where there is none.
    function map(q, [a, b], quantity) {
      const P = info.lengths[q], out = new Float64Array(L * P), cosine = arrays[`cosine.${a}.${b}`];
      for (let k = 0; k < L * P; k++) {
        const i = starts[q] * L + k;
        if (!cosine[i]) out[k] = NaN;
        else if (quantity === "norm") out[k] = Math.log2(size.values[norm(b, i)] / size.values[norm(a, i)]);
        else out[k] = distance.values[quantity === "overlap" ? overlap(a, b, i) : l2(a, b, i)];
      }
      return out;
    }

    // The ends of the colours, of all questions at the headline pair: 1 in 40 cells may be below, 1 in 1000 above.
    const known = {};
    function ends(quantity) {
      if (known[quantity]) return known[quantity];
      const counts = new Uint32Array(distance.values.length);
      let n = 0;
      info.lengths.forEach((P, q) => {
        for (const x of codesOf(q, info.pairs[info.headline], quantity)) if (x > 1) { counts[x]++; n++; }
      });
      const quantile = (share) => {
        let left = share * n, k = 2;
        while (k < counts.length - 1 && (left -= counts[k]) > 0) k++;
        return distance.values[k];
      };
      const low = quantile(0.025);
      return known[quantity] = [low, Math.max(quantile(0.999), 3 * low)];
    }
    function codesOf(q, [a, b], quantity) {
      const from = starts[q] * L, to = starts[q + 1] * L;
      if (quantity === "overlap" && data.overlap === "cosine") return arrays[`cosine.${a}.${b}`].subarray(from, to);
      return Array.from({ length: to - from }, (_, k) => quantity === "overlap" ? overlap(a, b, from + k) : l2(a, b, from + k));
    }

    const place = (q, position) => starts[q] + position;
    function output_(q, position, [a, b]) {
      const i = place(q, position), key = `${a}.${b}`, flags = arrays[`flags.${key}`];
      if (!flags || !flags[i]) return null;
      return {
        same: (flags[i] & 2) > 0, changed: (flags[i] & 4) > 0, replaced: arrays[`replaced.${key}`][i] - 1,
        rank: arrays[`rank.${key}`][i] - 1, kl: output.text(arrays[`kl.${key}`][i]),
      };
    }
    function step(q, position, n) {
      const entropy = arrays[`entropy.${n}`], i = place(q, position);
      if (!entropy || !entropy[i]) return null;
      return { entropy: output.text(entropy[i]), margin: output.text(arrays[`margin.${n}`][i]) };
    }

    // Tokens: numbers into data.tokens, from 1; 0 is none.
    const token = (number) => number ? { id: data.tokens.ids[number - 1], text: data.tokens.texts[number - 1] } : null;
    const list = (name, q, position, width) => {
      const from = place(q, position) * width, all = arrays[name];
      return all ? Array.from(all.subarray(from, from + width)) : [];
    };
    const width = (name) => arrays[name] ? arrays[name].length / starts.at(-1) : 0;
    function top(q, position, n) {
      return list(`top.${n}`, q, position, width(`top.${n}`)).map(token).filter(Boolean);
    }
    function moved(which, q, position, [a, b]) {
      const name = `${which}.${a}.${b}`, ranks = list(`${which}_rank.${a}.${b}`, q, position, width(name));
      return list(name, q, position, width(name)).map((t, k) => t && { ...token(t), rank: ranks[k] }).filter(Boolean);
    }
    // Leading tokens of a layer's logit lens; null where none were recorded, "left out" where none are embedded.
    function lens(q, position, layer, n) {
      const row = arrays.lens_row ? arrays.lens_row[place(q, position)] : 0, numbers = arrays[`lens.${n}`];
      if (!row || !numbers) return null;
      if (row === 1) return "left out";
      const from = ((row - 2) * L + layer) * data.lens.top;
      return Array.from(numbers.subarray(from, from + data.lens.top), token).filter(Boolean);
    }
    const emitted = (q, position, n) => arrays[`token.${n}`] && position >= 0 ? token(arrays[`token.${n}`][place(q, position)]) : null;

    return { info, L, cell, map, ends, output: output_, step, top, moved, lens, emitted, hasTokens: Boolean(arrays["top.1"]) };
  }

  return { open };
};
