// The items of a gallery: columns of words, numbers and sets, prompts that arrive in parts, and
// details that are read when an item is opened. Data files are scripts, because a page that was
// opened from disk may not fetch.
"use strict";

(() => {
  const waiting = new Map();
  const arrived = new Map();

  // What each data file calls: its name and its content as JSON text.
  SB.give = (name, json) => {
    const value = JSON.parse(json);
    arrived.set(name, value);
    waiting.get(name)?.resolve(value);
  };

  // Returns what a data file that the page names itself holds; undefined if it did not arrive.
  SB.given = (name) => arrived.get(name);

  // Returns what a data file holds, loading it the first time.
  // Rejects where the file is not there, or is not what it should be.
  SB.load = (name, { keep = true } = {}) => {
    if (arrived.has(name)) return Promise.resolve(arrived.get(name));
    if (!waiting.has(name)) {
      const promise = {};
      promise.promise = new Promise((resolve, reject) => Object.assign(promise, { resolve, reject }));
      waiting.set(name, promise);
      const script = SB.el("script", { src: `data/${SB.index.data}/${name}.js`, charset: "utf-8" });
      const done = () => {
        script.remove();
        waiting.delete(name);
        if (!keep) arrived.delete(name);
      };
      script.addEventListener("load", () => {
        promise.reject(new Error(`The file ${name}.js of this gallery is damaged; make it again`));
        done();
      });
      script.addEventListener("error", () => {
        promise.reject(new Error("The gallery was made again since this page was opened: reload the page"));
        done();
      });
      document.head.append(script);
    }
    return waiting.get(name).promise;
  };

  // Returns a value for each item; data files have one where all are the same.
  function spread(values, count, kind, convert = (value) => value) {
    return Array.isArray(values) ? kind.from(values, convert) : new kind(count).fill(convert(values));
  }

  class Column {
    constructor(declared, values, count) {
      Object.assign(this, { name: declared.name, title: declared.title, kind: declared.kind, group: declared.group, unit: declared.unit ?? "" });
      if (this.kind === "number") {
        this.numbers = spread(values.numbers, count, Float64Array, (value) => (value === null ? NaN : value));
      } else {
        this.words = values.words;
        this.codes = spread(values.codes, count, Int32Array);
        if (this.kind === "set") this.sets = values.sets;
      }
    }

    // Returns whether items have more than one value.
    get varies() {
      if (this.kind === "number") return this.distinct(2).length > 1;
      if (this.kind === "set") return this.words.length > 0;
      return this.words.length + (this.codes.includes(-1) ? 1 : 0) > 1;
    }

    // Returns up to `most` values in their order, null for items without one last.
    distinct(most = Infinity) {
      if (this.kind !== "number") return this.words.map((_, code) => code);
      const found = new Set();
      for (const value of this.numbers) {
        if (!Number.isNaN(value)) found.add(value);
        if (found.size >= most) break;
      }
      return [...found].sort((a, b) => a - b);
    }

    // Returns an item's value as people read it; empty without one.
    shown(item) {
      if (this.kind === "number") return SB.figure(this.numbers[item], this.unit);
      const code = this.codes[item];
      if (code < 0) return "";
      return this.kind === "set" ? this.sets[code].map((word) => this.words[word]).join(", ") : this.words[code];
    }

    // Returns what to sort items by: a number for each.
    keys() {
      if (this.kind === "number") return this.numbers;
      const keyed = this.kind === "set" ? this.sets.map((set) => set.map((word) => this.words[word]).join(", ")) : this.words;
      const order = keyed.map((_, index) => index).sort((a, b) => SB.collator.compare(keyed[a], keyed[b]));
      const rank = new Float64Array(keyed.length);
      order.forEach((code, place) => { rank[code] = place; });
      return Float64Array.from(this.codes, (code) => (code < 0 ? NaN : rank[code]));
    }
  }
  SB.Column = Column;
  SB.collator = new Intl.Collator("en", { numeric: true });

  SB.figure = (value, unit = "") => {
    if (value === null || value === undefined || Number.isNaN(value)) return "";
    if (unit === "time") return new Date(value * 1000).toISOString().replace("T", " ").slice(0, 19);
    if (unit === "bytes") return value ? `${(value / 2 ** 30).toFixed(2)} GiB` : "0";
    if (unit === "s" || unit === "tok/s") return `${Number(value.toPrecision(4))} ${unit}`;
    const text = Number.isInteger(value) ? String(value) : String(Number(value.toPrecision(6)));
    return unit ? `${text} ${unit}` : text;
  };

  // Texts of which many items may have the same one: held once, and searched part by part.
  class Texts {
    constructor(codes, size, parts) {
      this.codes = Int32Array.from(codes);
      this.size = size;
      this.parts = new Array(parts).fill(null);
      this.loaded = 0;
    }

    get complete() {
      return this.loaded === this.parts.length;
    }

    add(number, texts) {
      const lower = texts.map((text) => text.toLowerCase());
      const ends = new Uint32Array(texts.length);
      let end = 0;
      lower.forEach((text, index) => { end += text.length + 1; ends[index] = end; });
      this.parts[number] = { texts, joined: `${lower.join("\n")}\n`, ends };
      this.loaded += 1;
    }

    // Returns an item's text; null while it is not here.
    of(item) {
      const code = this.codes[item];
      const part = this.parts[Math.floor(code / this.size)];
      return part ? part.texts[code % this.size] : null;
    }

    // Marks the texts that contain a term in lower case.
    matching(term) {
      const found = new Uint8Array(this.parts.length * this.size);
      this.parts.forEach((part, number) => {
        if (!part) return;
        let index = 0;
        for (let at = part.joined.indexOf(term); at >= 0; at = part.joined.indexOf(term, part.ends[index - 1])) {
          while (part.ends[index] <= at) index += 1;
          if (at + term.length < part.ends[index]) found[number * this.size + index] = 1;
          index += 1;
          if (index >= part.ends.length) break;
        }
      });
      return found;
    }
  }
  SB.Texts = Texts;

  // Makes the items from their data files.
  SB.makeItems = (index, given) => {
    const count = index.count;
    const columns = index.columns.map((declared) => new Column(declared, given.values[declared.name], count));
    const byName = new Map(columns.map((column) => [column.name, column]));
    const first = new Uint32Array(count + 1);
    given.num_images.forEach((images, item) => { first[item + 1] = first[item] + images; });
    const ids = new Texts(Array.from({ length: count }, (_, item) => item), Math.max(count, 1), 1);
    ids.add(0, given.ids);
    return {
      count,
      columns,
      byName,
      ids: given.ids,
      // The first digits of each job's key: which image a pick is of.
      marks: given.marks,
      idTexts: ids,
      run: Uint16Array.from(given.run),
      prompts: new Texts(given.prompt, index.prompts_in_part, index.prompt_parts),
      first,
      cells: Int32Array.from(given.cells),
      shapes: Uint16Array.from(given.shapes),
      files: Uint32Array.from(given.files),
      key: (item) => `${index.runs[given.run[item]].id}/${given.ids[item]}`,
      snippets: new Map(Object.entries(given.snippets).map(([item, text]) => [Number(item), text])),
      byKey() {
        this.keys ??= new Map(given.ids.map((_, item) => [this.key(item), item]));
        return this.keys;
      },
      images: (item) => first[item + 1] - first[item],
    };
  };

  // Loads the prompts part by part, and lets the page breathe between two of them.
  SB.loadPrompts = async (items, onpart) => {
    for (let number = 0; number < items.prompts.parts.length; number += 1) {
      items.prompts.add(number, await SB.load(`prompts-${number}`, { keep: false }));
      onpart(number);
      await new Promise((resolve) => setTimeout(resolve));
    }
  };

  // Returns what is known of an item besides its columns.
  SB.details = async (item) => {
    const size = SB.index.details_in_part;
    const part = await SB.load(`details-${Math.floor(item / size)}`);
    return { inputs: [], ...part[item % size] };
  };

  // Returns the address of a file in a run's folder.
  SB.fileUrl = (run, path) => SB.index.runs[run].root + path.split("/").map(encodeURIComponent).join("/");

  // Returns the address of an item's image; null if it has none.
  SB.imageUrl = (item, number = 0) => {
    const items = SB.items;
    if (number >= items.images(item)) return null;
    const form = SB.index.files[items.files[items.first[item] + number]];
    // The id last, and by a function: it may hold the marks, or what stands for something in a replacement.
    const path = form.startsWith("=") ? form.slice(1) : form.replace("{n}", String(number).padStart(3, "0")).replace("{id}", () => items.ids[item]);
    return SB.fileUrl(items.run[item], path);
  };

  // Returns whether an item's image was rejected and removed.
  SB.isDropped = (item) => SB.items.byName.get("dropped")?.shown(item) === "yes";

  // Returns what stands in the place of an image of a job that is done and has none.
  SB.noImage = (item) => SB.isDropped(item) ? "rejected and removed" : "no image";

  // Gives an element the thumbnail of an image, at most `side` pixels wide and high; returns whether
  // there is one.
  SB.showThumb = (node, item, number, side) => {
    const items = SB.items;
    const at = items.first[item] + number;
    const place = number < items.images(item) ? items.cells[at] : -1;
    return SB.showCell(node, place, place < 0 ? 0 : items.shapes[at], side);
  };

  SB.showCell = (node, place, shape, side) => {
    const style = node.style;
    if (place < 0) {
      style.backgroundImage = "none";
      return false;
    }
    const { cell, across, margin } = SB.index.sheets;
    const perSheet = across * across;
    const [width, height] = SB.index.shapes[shape];
    const scale = side / Math.max(width, height);
    const inside = place % perSheet;
    const left = (inside % across) * cell + margin;
    const top = Math.floor(inside / across) * cell + margin;
    style.width = `${width * scale}px`;
    style.height = `${height * scale}px`;
    style.backgroundImage = `url("sheets/${SB.index.sheets.names[Math.floor(place / perSheet)]}")`;
    style.backgroundSize = `${cell * across * scale}px`;
    style.backgroundPosition = `${-left * scale}px ${-top * scale}px`;
    return true;
  };
})();
