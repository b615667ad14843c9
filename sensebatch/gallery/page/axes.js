// A grid by axes: rows by one field, columns by another, the fields that vary beside them fixed.
"use strict";

(() => {
  const MOST_VALUES = 200;
  const MOST_CELLS = 4000;
  const ANY = "";
  // What follows from other fields or from the draw: to lay out by, not to hold fixed.
  const MINOR = new Set(["width", "height", "num_images", "num_input_images", "status", "finish_reason", "error_type", "near_duplicate", "alike", "in_manifest", "source_file", "session", "worker", "node", "vram_mode", "system_prompt_source", "device", "torch_version", "budget_bytes", "checkpoint"]);

  class Axes {
    constructor({ onchange, onopen, onfilter }) {
      Object.assign(this, { onchange, onopen, onfilter });
      this.rows = undefined;
      this.columns = undefined;
      this.fixed = new Map();
      this.node = SB.el("div", { class: "scroller axes", tabindex: -1 });
    }

    // Returns the fields that an axis can have: whatever takes a few values among the items shown.
    fields(result) {
      const fields = [];
      const prompts = new Set();
      for (const item of result) {
        prompts.add(SB.items.prompts.codes[item]);
        if (prompts.size > MOST_VALUES) break;
      }
      if (prompts.size > 1 && prompts.size <= MOST_VALUES) fields.push(promptField(prompts));
      for (const column of SB.items.columns) {
        if (column.kind === "set" || column.group === "Picks" || column.group === "Figures") continue;
        const field = columnField(column, result);
        if (field) fields.push(field);
      }
      return fields;
    }

    show(result, side) {
      this.side = side;
      const fields = this.fields(result);
      const byName = new Map(fields.map((field) => [field.name, field]));
      const [rowsName, columnsName] = this.chosen(fields, byName);
      const rows = byName.get(rowsName), columns = byName.get(columnsName);
      // Jobs outside a matrix are not part of a grid of its values.
      const axes = [rows, columns].filter((field) => field?.group === "Matrix");
      this.result = result.filter((item) => !axes.some((field) => field.isNone(field.of(item))));
      if (!fields.length) return SB.put(this.node, SB.el("p", { class: "notice" }, "Nothing varies among the items shown, so there is nothing to lay out. Remove a filter."));
      const others = this.others(fields, rows, columns);
      for (const field of [rows, columns, ...others]) field?.narrow?.(this.result);
      for (const name of [...this.fixed.keys()]) if (!others.some((field) => field.name === name)) this.fixed.delete(name);
      return SB.put(this.node, this.controls(fields, others, rowsName, columnsName), this.table(rows, columns, others));
    }

    // Returns the names of both axes: those that were asked for, else matrix values, then seeds.
    // What was asked for stays so, as a search that has not found everything yet may lack it.
    chosen(fields, byName) {
      const rank = (field) => [field.group !== "Matrix", field.name !== "seed", field.group !== "Settings", field.name !== "prompt", field.name !== "run", MINOR.has(field.name)].map(Number).join("");
      const ranked = [...fields].sort((a, b) => (rank(a) < rank(b) ? -1 : rank(a) > rank(b) ? 1 : 0));
      const rows = byName.has(this.rows) ? this.rows : ranked.find((field) => field.name !== this.columns)?.name;
      if (this.columns === ANY || (byName.has(this.columns) && this.columns !== rows)) return [rows, this.columns];
      return [rows, ranked.find((field) => field.name !== rows)?.name ?? ANY];
    }

    // Returns the fields that still vary where both axes are fixed.
    others(fields, rows, columns) {
      const places = new Map();
      const cells = Array.from(this.result, (item) => {
        const place = `${rows?.of(item)} ${columns?.of(item)}`;
        if (!places.has(place)) places.set(place, places.size);
        return places.get(place);
      });
      return fields.filter((field) => {
        if (field === rows || field === columns || MINOR.has(field.name)) return false;
        const seen = new Array(places.size);
        return this.result.some((item, index) => {
          const value = field.of(item);
          // Items without a number are equal too.
          if (seen[cells[index]] !== undefined && !Object.is(seen[cells[index]], value)) return true;
          seen[cells[index]] = value;
          return false;
        });
      });
    }

    controls(fields, others, rows, columns) {
      const options = fields.map((field) => [field.name, field.title]);
      const change = (action) => (value) => { action(value); this.onchange(); };
      const set = (newRows, newColumns) => { this.rows = newRows; this.columns = newColumns; };
      const named = (words, select) => SB.el("label", null, SB.el("span", null, words), select);
      return SB.el("div", { class: "axes-controls" },
        named("Rows", SB.select("Rows", options, rows, change((value) => set(value, value === columns ? rows : columns)))),
        SB.button("⇄", change(() => columns && set(columns, rows)), { title: "Swap rows and columns", "aria-label": "Swap rows and columns" }),
        named("Columns", SB.select("Columns", [[ANY, "none"], ...options], columns, change((value) => set(value === rows ? columns || rows : rows, value)))),
        others.length ? SB.el("span", { class: "dim" }, "fixed:") : null,
        others.map((field) => named(field.title, SB.select(field.title, [[ANY, "any"], ...field.values.map((value) => [String(value), field.shown(value)])], this.fixed.get(field.name) ?? ANY,
          change((value) => { if (value === ANY) this.fixed.delete(field.name); else this.fixed.set(field.name, value); })))));
    }

    table(rows, columns, others) {
      const cells = new Map();
      const fixed = others.filter((field) => this.fixed.has(field.name));
      for (const item of this.result) {
        if (fixed.some((field) => String(field.of(item)) !== this.fixed.get(field.name))) continue;
        const place = `${rows.of(item)} ${columns ? columns.of(item) : ANY}`;
        if (!cells.has(place)) cells.set(place, []);
        cells.get(place).push(item);
      }
      const across = columns ? columns.values : [ANY];
      const fits = Math.max(1, Math.floor(MOST_CELLS / across.length));
      const down = rows.values.slice(0, fits);
      const body = down.map((row) => SB.el("tr", null, SB.el("th", { scope: "row" }, rows.shown(row)),
        across.map((column) => SB.el("td", null, this.cell(cells.get(`${row} ${column}`), rows, row, columns, column)))));
      const head = columns && SB.el("thead", null, SB.el("tr", null, SB.el("th", { class: "corner" }, `${rows.title} \\ ${columns.title}`), across.map((column) => SB.el("th", { scope: "col" }, columns.shown(column)))));
      return [
        SB.el("table", { class: "axes-table" }, head, SB.el("tbody", null, body)),
        fits < rows.values.length ? SB.el("p", { class: "notice" }, `The first ${SB.count(fits)} of ${SB.counted(rows.values.length, "row")}; filter to see the others.`) : null,
      ];
    }

    cell(found, rows, row, columns, column) {
      if (!found) return SB.el("span", { class: "none" }, "–");
      const item = found.find((one) => SB.items.images(one)) ?? found[0];
      const thumb = SB.el("span", { class: "thumb" });
      const box = SB.el("button", { type: "button", class: "plain cell", style: { width: `${this.side}px`, height: `${this.side}px` }, "aria-label": SB.items.ids[item], title: SB.items.ids[item], onclick: () => this.onopen(item, found) }, thumb);
      if (!SB.showThumb(thumb, item, 0, this.side)) thumb.replaceWith(SB.el("span", { class: "placeholder" }, SB.items.byName.get("status").shown(item) === "done" ? SB.noImage(item) : SB.items.byName.get("status").shown(item)));
      const more = found.length > 1 && SB.button(`+${SB.count(found.length - 1)}`, () => this.onfilter([[rows, row], [columns, column]]), { class: "more", title: "Show all of this cell" });
      return [box, more];
    }
  }
  SB.Axes = Axes;

  function promptField(codes) {
    const texts = SB.items.prompts;
    const values = [...codes].sort((a, b) => a - b);
    const sample = new Map();
    for (let item = 0; item < SB.items.count; item += 1) if (codes.has(texts.codes[item]) && !sample.has(texts.codes[item])) sample.set(texts.codes[item], item);
    return { name: "prompt", title: "Prompt", group: "Job", values, of: (item) => texts.codes[item], shown: (code) => SB.short(texts.of(sample.get(code))) ?? "…", isNone: () => false, whole: (code) => texts.of(sample.get(code)) };
  }

  function columnField(column, result) {
    const isNumber = column.kind === "number";
    const of = isNumber ? (item) => column.numbers[item] : (item) => column.codes[item];
    const seen = new Set();
    for (const item of result) {
      seen.add(of(item));
      if (seen.size > MOST_VALUES) return null;
    }
    if (seen.size < 2) return null;
    const isNone = (value) => (isNumber ? Number.isNaN(value) : value < 0);
    const shown = (value) => (isNone(value) ? "none" : isNumber ? SB.figure(value, column.unit) : column.words[value]);
    const sorted = (all) => [...all].sort((a, b) => (isNone(a) ? 1 : isNone(b) ? -1 : isNumber ? a - b : SB.collator.compare(column.words[a], column.words[b])));
    const field = { name: column.name, title: column.title, group: column.group, column, values: sorted(seen), of, shown, isNone };
    field.narrow = (items) => { field.values = sorted(new Set(Array.from(items, of))); };
    return field;
  }
})();
