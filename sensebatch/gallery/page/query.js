// Which items are shown and in which order: a search, facets, and a column to sort by.
"use strict";

(() => {
  const TERM = /(-?)(?:([\p{L}_][\p{L}\p{N}_.]*)(:|>=|<=|=|>|<))?(?:"([^"]*)"?|(\S+))/gu;

  // Returns the terms of a search: words, "phrases", -excluded, column:word and column>number.
  SB.parseSearch = (text) =>
    [...text.matchAll(TERM)].map(([whole, minus, name, sign, phrase, word]) => {
      const column = name === undefined ? undefined : findColumn(name);
      // A colon in a prompt is not a filter.
      if (name !== undefined && column === undefined) return { excluded: minus === "-", text: (minus ? whole.slice(1) : whole).replaceAll('"', "").toLowerCase() };
      return { excluded: minus === "-", column, sign, text: (phrase ?? word ?? "").toLowerCase() };
    }).filter((term) => term.text !== "" || term.column);

  function findColumn(name) {
    const wanted = name.toLowerCase();
    return SB.items.columns.find((column) => column.name.toLowerCase() === wanted || column.title.toLowerCase().replaceAll(" ", "_") === wanted);
  }

  // Returns a byte for each item: whether it has a term.
  function having(term) {
    const items = SB.items;
    const found = new Uint8Array(items.count);
    if (term.column) {
      markColumn(found, term.column, term.sign, term.text);
      return found;
    }
    const prompts = items.prompts.matching(term.text);
    const ids = items.idTexts.matching(term.text);
    const codes = items.prompts.codes;
    for (let item = 0; item < items.count; item += 1) found[item] = prompts[codes[item]] | ids[item];
    for (const column of items.columns) if (column.kind !== "number") markColumn(found, column, ":", term.text);
    return found;
  }

  function markColumn(found, column, sign, text) {
    if (column.kind === "number") {
      const wanted = Number(text);
      const test = { ":": (v) => v === wanted, "=": (v) => v === wanted, ">": (v) => v > wanted, "<": (v) => v < wanted, ">=": (v) => v >= wanted, "<=": (v) => v <= wanted }[sign];
      // A column without a value after it: items that have one.
      column.numbers.forEach((value, item) => { if (text === "" ? !Number.isNaN(value) : test(value)) found[item] = 1; });
      return;
    }
    const isWord = (word) => {
      const lower = word.toLowerCase();
      if (sign === ":") return lower.includes(text);
      if (sign === "=") return lower === text;
      const order = SB.collator.compare(lower, text);
      return { ">": order > 0, "<": order < 0, ">=": order >= 0, "<=": order <= 0 }[sign];
    };
    const words = column.words.map((word) => (isWord(word) ? 1 : 0));
    const hit = column.kind === "set" ? column.sets.map((set) => (set.some((word) => words[word]) ? 1 : 0)) : words;
    if (!hit.includes(1)) return;
    column.codes.forEach((code, item) => { if (code >= 0 && hit[code]) found[item] = 1; });
  }

  // A facet that is set: words to have, or a range of numbers.
  function failing(column, wanted) {
    if (column.kind === "number") {
      const { from, to } = wanted;
      return (item) => !(column.numbers[item] >= from && column.numbers[item] <= to);
    }
    // One entry more, for items without a value.
    const codes = column.kind === "set" ? column.sets : column.words;
    const passes = new Uint8Array(codes.length + 1);
    codes.forEach((set, code) => {
      passes[code + 1] = column.kind === "set"
        ? set.some((word) => wanted.has(column.words[word])) || (set.length === 0 && wanted.has(SB.NONE))
        : wanted.has(column.words[code]);
    });
    passes[0] = wanted.has(SB.NONE) ? 1 : 0;
    return (item) => !passes[column.codes[item] + 1];
  }

  SB.NONE = "\u0000none";

  class Query {
    constructor() {
      this.search = "";
      this.facets = new Map();
      this.sort = "";
      this.descending = false;
      this.orders = new Map();
      this.result = new Uint32Array(0);
    }

    // Finds the items; `counted` are the columns whose values are counted.
    run(counted) {
      const items = SB.items;
      const count = items.count;
      const fails = new Uint8Array(count);
      const last = new Uint8Array(count);
      for (const term of SB.parseSearch(this.search)) {
        const found = having(term);
        const wanted = term.excluded ? 0 : 1;
        for (let item = 0; item < count; item += 1) if (found[item] !== wanted) fails[item] = 2;
      }
      const active = [...this.facets].filter(([name]) => items.byName.has(name));
      active.forEach(([name, wanted], number) => {
        const fail = failing(items.byName.get(name), wanted);
        for (let item = 0; item < count; item += 1) {
          if (fails[item] < 2 && fail(item)) { fails[item] += 1; last[item] = number; }
        }
      });
      const order = this.order();
      const result = new Uint32Array(count);
      let length = 0;
      for (let place = 0; place < count; place += 1) if (fails[order[place]] === 0) result[length++] = order[place];
      this.result = result.subarray(0, length);
      this.counts = new Map(counted.map((column) => {
        const number = active.findIndex(([name]) => name === column.name);
        return [column.name, counts(column, (item) => fails[item] === 0 || (fails[item] === 1 && last[item] === number))];
      }));
      return this.result;
    }

    // Returns all items in the order asked for.
    order() {
      const name = `${this.sort} ${this.descending}`;
      if (!this.orders.has(name)) {
        if (this.orders.size > 8) this.orders.clear();
        this.orders.set(name, this.sorted());
      }
      return this.orders.get(name);
    }

    // Forgets the order by columns that have changed.
    forget(names) {
      for (const key of [...this.orders.keys()]) if (names.includes(key.split(" ")[0])) this.orders.delete(key);
    }

    sorted() {
      const items = SB.items;
      const order = Uint32Array.from({ length: items.count }, (_, item) => item);
      const keys = sortKeys(this.sort);
      if (!keys) return this.descending ? order.reverse() : order;
      const sign = this.descending ? -1 : 1;
      // Items without a value come last either way; equal ones keep their order.
      return order.sort((a, b) => {
        const one = keys[a], other = keys[b];
        if (one === other) return a - b;
        if (one !== one) return other !== other ? a - b : 1;
        if (other !== other) return -1;
        return (one - other) * sign;
      });
    }
  }
  SB.Query = Query;

  function sortKeys(name) {
    const items = SB.items;
    if (name === "prompt" || name === "id") {
      const texts = name === "prompt" ? items.prompts : items.idTexts;
      const all = texts.parts.flatMap((part) => part?.texts ?? []);
      const order = all.map((_, index) => index).sort((a, b) => (all[a] < all[b] ? -1 : all[a] > all[b] ? 1 : 0));
      const rank = new Float64Array(all.length);
      order.forEach((text, place) => { rank[text] = place; });
      return Float64Array.from(texts.codes, (code) => rank[code] ?? NaN);
    }
    return items.byName.get(name)?.keys();
  }

  function counts(column, isCounted) {
    const count = SB.items.count;
    const codes = column.codes;
    const found = new Uint32Array((column.kind === "set" ? column.sets : column.words).length + 1);
    for (let item = 0; item < count; item += 1) if (isCounted(item)) found[codes[item] + 1] += 1;
    const words = new Map();
    const add = (word, number) => words.set(word, (words.get(word) ?? 0) + number);
    add(SB.NONE, found[0]);
    if (column.kind === "set") {
      column.sets.forEach((set, code) => {
        if (set.length === 0) add(SB.NONE, found[code + 1]);
        for (const word of set) add(column.words[word], found[code + 1]);
      });
    } else column.words.forEach((word, code) => add(word, found[code + 1]));
    return words;
  }
})();
