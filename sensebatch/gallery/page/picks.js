// Picks: keep, reject and tags for items, kept in the browser and saved as a file.
"use strict";

(() => {
  const WORDS = ["keep", "reject"];
  // Writing more of them than this takes long enough to be noticed at every key.
  const MANY = 2000;

  class Picks {
    constructor() {
      this.all = new Map();
      this.listeners = [];
      this.unwritten = new Set();
      addEventListener("pagehide", () => this.write());
      addEventListener("storage", (event) => this.follow(event));
      for (const run of SB.index.runs) this.read(run);
    }

    // Picks are kept by run, so that every gallery of a run has the same.
    place(run) {
      return `sensebatch-picks-${run.id}`;
    }

    read(run) {
      try {
        const kept = JSON.parse(localStorage.getItem(this.place(run)) ?? "{}");
        for (const [id, pick] of Object.entries(kept)) this.all.set(`${run.id}/${id}`, clean(pick));
      } catch {
        // What cannot be read cannot be written either, which is said then.
      }
    }

    // Takes over what another page of the run has kept.
    follow(event) {
      const run = SB.index.runs.find((one) => this.place(one) === event.key);
      if (!run) return;
      const before = [...this.all.keys()].filter((key) => key.startsWith(`${run.id}/`));
      for (const key of before) this.all.delete(key);
      this.read(run);
      const byKey = SB.items.byKey();
      for (const key of new Set([...before, ...this.all.keys()])) if (byKey.has(key)) this.mark(byKey.get(key));
      for (const listener of this.listeners) listener();
    }

    // Writes the picks of the runs whose picks have changed.
    write() {
      clearTimeout(this.writing);
      try {
        for (const run of this.unwritten) {
          const start = `${run.id}/`;
          const own = [...this.all].filter(([key]) => key.startsWith(start)).map(([key, pick]) => [key.slice(start.length), pick]);
          if (own.length) localStorage.setItem(this.place(run), JSON.stringify(Object.fromEntries(own)));
          else localStorage.removeItem(this.place(run));
        }
        this.unwritten.clear();
      } catch {
        if (!this.unkept) this.complaint = "This browser stores no more for this page: save the picks as a file before you leave";
        this.unkept = true;
      }
    }

    // Returns an item's pick; one of an image that was replaced since does not count.
    of(item) {
      const pick = this.all.get(SB.items.key(item));
      return pick === undefined || (pick.of && pick.of !== SB.items.marks[item]) ? {} : pick;
    }

    // Sets what is given of a pick on items: {verdict: "keep"|"reject"|null, tag: "...", untag: "..."}.
    set(items, { verdict, tag, untag }) {
      for (const item of items) {
        const pick = { ...this.of(item), of: SB.items.marks[item] };
        if (verdict === null) delete pick.verdict;
        else if (verdict !== undefined) pick.verdict = verdict;
        const tags = new Set(pick.tags ?? []);
        if (tag) tags.add(tag);
        if (untag) tags.delete(untag);
        if (tags.size) pick.tags = [...tags].sort();
        else delete pick.tags;
        this.keep(item, pick);
      }
      this.changed(new Set([...items].map((item) => SB.items.run[item])));
    }

    keep(item, pick) {
      if (pick.verdict || pick.tags) this.all.set(SB.items.key(item), pick);
      else this.all.delete(SB.items.key(item));
      this.mark(item);
    }

    // Sets a verdict, or takes it back where all items have it.
    toggle(items, verdict) {
      if (!items.length) return;
      const has = items.every((item) => this.of(item).verdict === verdict);
      this.set(items, { verdict: has ? null : verdict });
      const done = verdict === "keep" ? "kept" : "rejected";
      this.say(has ? `No longer ${done}: ${named(items)}` : `${done[0].toUpperCase()}${done.slice(1)}: ${named(items)}`);
    }

    // Says what was done, or what went wrong with it.
    say(words) {
      SB.say(this.complaint ?? words);
      this.complaint = undefined;
    }

    changed(runs) {
      for (const run of runs) this.unwritten.add(SB.index.runs[run]);
      clearTimeout(this.writing);
      if (this.all.size <= MANY) this.write();
      else this.writing = setTimeout(() => this.write(), 400);
      for (const listener of this.listeners) listener();
    }

    get tags() {
      return [...new Set([...this.all.values()].flatMap((pick) => pick.tags ?? []))].sort();
    }

    // Returns how many items of this gallery have a pick: {keep, reject, tagged}.
    count() {
      const { codes } = SB.items.byName.get("pick");
      const tags = SB.items.byName.get("pick_tag").codes;
      const found = { keep: 0, reject: 0, tagged: 0 };
      codes.forEach((code, item) => {
        if (code === 0) found.keep += 1;
        if (code === 1) found.reject += 1;
        if (tags[item] >= 0) found.tagged += 1;
      });
      return found;
    }

    // Makes the columns that are filtered and sorted by.
    makeColumns() {
      const items = SB.items;
            const pick = new SB.Column({ name: "pick", title: "Pick", kind: "word", group: "Picks" }, { words: [...WORDS], codes: -1 }, items.count);
      const tags = new SB.Column({ name: "pick_tag", title: "Own tags", kind: "set", group: "Picks" }, { words: [], sets: [], codes: -1 }, items.count);
      items.columns.unshift(pick, tags);
      items.byName.set("pick", pick).set("pick_tag", tags);
      const byKey = this.all.size ? items.byKey() : new Map();
      for (const key of this.all.keys()) if (byKey.has(key)) this.mark(byKey.get(key));
    }

    mark(item) {
      const pick = this.of(item);
      SB.items.byName.get("pick").codes[item] = WORDS.indexOf(pick.verdict);
      const column = SB.items.byName.get("pick_tag");
      if (!pick.tags) {
        column.codes[item] = -1;
        return;
      }
      const set = pick.tags.map((tag) => {
        if (!column.words.includes(tag)) column.words.push(tag);
        return column.words.indexOf(tag);
      });
      let code = column.sets.findIndex((other) => other.join() === set.join());
      if (code < 0) code = column.sets.push(set) - 1;
      column.codes[item] = code;
    }

    // Saves the picks of this gallery as a file that sensebatch reads.
    async save() {
      const items = SB.items;
      const runs = SB.index.runs.map((run) => ({ run: run.id, folder: run.name, jobs: {} }));
      const keys = await SB.load("keys");
      for (let item = 0; item < items.count; item += 1) {
        const pick = this.of(item);
        if (!pick.verdict && !pick.tags) continue;
        const entry = { pick: pick.verdict ?? null, key: keys[item] };
        if (pick.tags) entry.tags = pick.tags;
        // Defined, not set: a job may be called __proto__.
        Object.defineProperty(runs[items.run[item]].jobs, items.ids[item], { value: entry, enumerable: true });
      }
      const file = { sensebatch_picks: 1, saved_at: new Date().toISOString().replace(/\.\d+Z$/, "Z"), runs: runs.filter((run) => Object.keys(run.jobs).length) };
      const link = SB.el("a", { href: URL.createObjectURL(new Blob([`${JSON.stringify(file, null, 1)}\n`], { type: "application/json" })), download: "picks.json" });
      link.click();
      setTimeout(() => URL.revokeObjectURL(link.href), 60000);
      SB.say("Saved picks.json: sensebatch jobs, export and run --retry-from read it");
    }

    // Adds the picks of a file to those here.
    async open(file) {
      let read;
      try {
        read = JSON.parse(await file.text());
        if (read?.sensebatch_picks !== 1 || !Array.isArray(read.runs)) throw new Error("it is not a picks file");
      } catch (error) {
        SB.say(`${file.name} cannot be used: ${error.message}`);
        return;
      }
      const byKey = SB.items.byKey();
      const keys = await SB.load("keys");
      let added = 0, skipped = 0;
      for (const run of read.runs) {
        for (const [id, entry] of Object.entries(run?.jobs ?? {})) {
          const item = byKey.get(`${run.run}/${id}`);
          if (item === undefined || (entry.key && entry.key !== keys[item])) skipped += 1;
          else {
            const given = clean({ verdict: entry.pick, tags: entry.tags });
            this.keep(item, { ...this.of(item), ...given, of: SB.items.marks[item] });
            added += 1;
          }
        }
      }
      this.changed(SB.index.runs.keys());
      this.say(`Opened ${SB.counted(added, "pick")}${skipped ? `; ${SB.count(skipped)} are of other runs or of images that were replaced` : ""}`);
    }
  }
  SB.Picks = Picks;

  // Returns what can be used of a pick that was read.
  function clean(pick) {
    const found = {};
    if (WORDS.includes(pick?.verdict)) found.verdict = pick.verdict;
    if (Array.isArray(pick?.tags) && pick.tags.length) found.tags = pick.tags.map(String);
    if (typeof pick?.of === "string") found.of = pick.of;
    return found;
  }

  function named(items) {
    return items.length === 1 ? SB.items.ids[items[0]] : SB.counted(items.length, "item");
  }
})();
