// The report: what the runs cost, as plots with their numbers beside them.
"use strict";

(() => {
  const WIDTH = 640;
  const HEIGHT = 150;
  const LEFT = 56;
  const BOTTOM = 22;

  const seconds = (value) => {
    if (value === null || value === undefined) return "–";
    if (value < 60) return `${value.toFixed(value < 10 ? 2 : 1)} s`;
    const minutes = Math.round(value / 60);
    return value < 3600 ? `${Math.floor(value / 60)} min ${Math.round(value % 60)} s` : `${Math.floor(minutes / 60)} h ${minutes % 60} min`;
  };
  const number = (value, digits = 2) => (value === null || value === undefined ? "–" : value.toLocaleString("en-US", { maximumFractionDigits: digits, minimumFractionDigits: value && Math.abs(value) < 100 ? digits : 0 }));
  const gib = (value) => (value ? `${(value / 2 ** 30).toFixed(2)} GiB` : "–");
  const percent = (value) => `${(100 * value).toFixed(value < 0.1 ? 2 : 1)} %`;

  class Report {
    constructor({ onfilter }) {
      this.onfilter = onfilter;
      this.node = SB.el("div", { class: "scroller report", tabindex: 0, "aria-label": "Report" });
    }

    async show() {
      if (this.isDrawn) return;
      this.isDrawn = true;
      try {
        const { runs } = await SB.load("report");
        SB.put(this.node, SB.el("div", { class: "report-inner" }, runs.length > 1 ? across(runs) : null, runs.map((run, index) => this.run(run, index))));
      } catch (error) {
        this.isDrawn = false;
        SB.put(this.node, SB.el("p", { class: "notice" }, error.message));
      }
    }

    run(run, index) {
      return SB.el("section", { class: "run" },
        SB.el("h2", null, run.name),
        SB.el("p", { class: "dim" }, run.words),
        SB.el("dl", { class: "tiles" }, run.figures.map(([name, value, note]) =>
          SB.el("div", null, SB.el("dt", null, name), SB.el("dd", null, value), note ? SB.el("dd", { class: "dim" }, note) : null))),
        run.workers.length ? [timeline(run), speed(run), memory(run)] : null,
        run.groups.length ? groups(run) : null,
        run.waits.length ? waits(run) : null,
        this.finished(run),
        this.failures(run, index));
    }

    finished(run) {
      if (!run.finish_reasons.length) return null;
      return part("How jobs ended", bars(run.finish_reasons.map(([word, count]) => [word, count, SB.count(count)])),
        table(["Finish reason", "Jobs", ""], run.finish_reasons.map(([word, count]) => [word, SB.count(count), SB.button("Show", () => this.onfilter("finish_reason", word))])));
    }

    failures(run) {
      if (!run.failures.length) return null;
      return SB.el("section", { class: "part wide" }, SB.el("h3", null, "Failures"),
        table(["Error", "Jobs", "Message of one of them", "Which", ""], run.failures.map((one) => [one.type, SB.count(one.count), SB.el("span", { class: "message" }, one.message), one.jobs.join(", ") + (one.count > one.jobs.length ? " …" : ""), SB.button("Show", () => this.onfilter("error_type", one.type))])));
    }
  }
  SB.Report = Report;

  function part(title, plot, numbers, { manyNumbers = false } = {}) {
    return SB.el("section", { class: "part" }, SB.el("h3", null, title), SB.el("div", { class: `plot-and-numbers${manyNumbers ? " many" : ""}` }, SB.el("div", { class: "plot" }, plot), SB.el("div", { class: "numbers" }, numbers)));
  }

  function table(head, rows) {
    return SB.el("div", { class: "table-scroll" }, SB.el("table", null,
      SB.el("thead", null, SB.el("tr", null, head.map((words) => SB.el("th", { scope: "col" }, words)))),
      SB.el("tbody", null, rows.map((row) => SB.el("tr", null, row.map((cell) => SB.el("td", null, cell)))))));
  }

  function across(runs) {
    return SB.el("section", { class: "part wide" }, SB.el("h2", null, "All runs"),
      table(["Run", "Jobs done", "Failed", "Images", "Generation", "s an image", "Image tok/s"], runs.map((run) => [run.name, SB.count(run.totals.done), SB.count(run.totals.failed), SB.count(run.totals.images), seconds(run.totals.wall_s), number(run.totals.seconds_per_image, 3), number(run.totals.image_tok_per_s)])));
  }

  // A frame with a time axis and a scale; `draw` gets functions from values to places.
  function frame(run, top, label, draw, describe) {
    const x = (at) => LEFT + (at / (run.span_s || 1)) * (WIDTH - LEFT - 8);
    const y = (value) => HEIGHT - BOTTOM - (value / (top || 1)) * (HEIGHT - BOTTOM - 10);
    const ticks = niceTimes(run.span_s);
    return SB.svg("svg", { viewBox: `0 0 ${WIDTH} ${HEIGHT}`, role: "img", "aria-label": describe, class: "chart" },
      [0, 0.5, 1].map((share) => [
        SB.svg("line", { x1: LEFT, x2: WIDTH - 8, y1: y(top * share), y2: y(top * share), class: "gridline" }),
        SB.svg("text", { x: LEFT - 6, y: y(top * share) + 4, "text-anchor": "end" }, label(top * share))]),
      draw(x, y),
      run.sessions.slice(1).map((session) => SB.svg("line", { x1: x(session.start_s), x2: x(session.start_s), y1: 6, y2: HEIGHT - BOTTOM, class: "session" }, SB.svg("title", null, `process ${session.number} began`))),
      ticks.map((at) => SB.svg("text", { x: x(at), y: HEIGHT - 5, "text-anchor": at ? "middle" : "start" }, at ? shortTime(at) : "0")));
  }

  function niceTimes(span) {
    const step = [1, 2, 5, 10, 20, 30, 60, 120, 300, 600, 1200, 1800, 3600, 7200, 14400, 28800, 86400].find((one) => span / one <= 8) ?? span / 6;
    const times = [];
    for (let at = 0; at < span * 0.97; at += step) times.push(at);
    return times;
  }

  function shortTime(at) {
    if (at >= 3600) return `${Math.floor(at / 3600)} h${at % 3600 ? ` ${Math.round((at % 3600) / 60)}` : ""}`;
    return at >= 60 ? `${Math.floor(at / 60)} min${at % 60 ? ` ${at % 60}` : ""}` : `${at} s`;
  }

  function timeline(run) {
    const charts = run.workers.map((worker) => SB.el("figure", null,
      run.workers.length > 1 ? SB.el("figcaption", { class: "dim" }, worker.name) : null,
      frame(run, 1, (share) => `${Math.round(share * 100)} %`, (x, y) => worker.bins.flatMap((bin, place) => {
        let base = 0;
        return bin.map((share, phase) => {
          if (!share) return null;
          const from = base;
          base += share;
          return SB.svg("rect", { class: `phase-${run.phases[phase]}`, x: x(place * run.bin_s), width: Math.max(x(run.bin_s) - x(0) - 0.4, 0.6), y: y(base), height: Math.max(y(from) - y(base), 0) });
        });
      }).filter(Boolean), `What the device of ${worker.name} did over the time of the run`)));
    const legend = SB.el("p", { class: "legend" }, run.phases.map((name) => SB.el("span", null, SB.el("i", { class: `swatch phase-${name}` }), name)));
    const rows = run.phases.map((name, phase) => {
      const all = run.workers.reduce((sum, worker) => sum + worker.seconds[phase], 0);
      return [name, seconds(all), percent(all / (run.busy_s || 1))];
    });
    return part("Timeline", [charts, legend], table(["Phase", "Time", "Share"], rows));
  }

  function area(points, x, y, step) {
    const steps = points.map((value, place) => `L${x(place * step)},${y(value)} L${x((place + 1) * step)},${y(value)}`).join(" ");
    return `M${x(0)},${y(0)} ${steps} L${x(points.length * step)},${y(0)} Z`;
  }

  function speed(run) {
    const top = Math.max(...run.images_per_minute, 1e-9);
    const figure = frame(run, top, (value) => number(value, top < 10 ? 1 : 0), (x, y) => SB.svg("path", { class: "area", d: area(run.images_per_minute, x, y, run.bin_s) }), "Images a minute over the time of the run");
    const totals = run.totals;
    return part("Images a minute", figure, table(["Figure", "Value"], [
      ["images", SB.count(totals.images)], ["images a minute, mean", number((60 * totals.images) / (run.span_s || 1))], ["most in a bin", number(top)],
      ["s an image, in the engine", number(totals.seconds_per_image, 3)], ["image tok/s", number(totals.image_tok_per_s)], ["width of a bin", seconds(run.bin_s)]]));
  }

  function memory(run) {
    const series = [["reserved on the device", "reserved"], ["allocated on the device", "allocated"], ["resident on the host", "rss"]].filter(([, name]) => run.memory[name].some(Boolean));
    if (!series.length) return null;
    const top = Math.max(...series.flatMap(([, name]) => run.memory[name]));
    const figure = frame(run, top, (value) => `${number(value / 2 ** 30, 1)} GiB`, (x, y) => series.map(([words, name]) => {
      const d = run.memory[name].map((value, place) => (value ? `${x(place * run.bin_s)},${y(value)} ${x((place + 1) * run.bin_s)},${y(value)}` : "")).filter(Boolean).join(" ");
      return SB.svg("polyline", { class: `memory-${name}`, points: d }, SB.svg("title", null, words));
    }), "Peak memory over the time of the run");
    const legend = SB.el("p", { class: "legend" }, series.map(([words, name]) => SB.el("span", null, SB.el("i", { class: `swatch memory-${name}` }), words)));
    return part("Peak memory", [figure, legend], table(["Peak", "Generation", "Load"], series.map(([words, name]) => [words, gib(Math.max(...run.memory[name])), gib(run.load_peak[name])])));
  }

  function bars(rows) {
    const top = Math.max(...rows.map(([, value]) => value ?? 0), 1e-9);
    return SB.el("div", { class: "bars" }, rows.map(([name, value, words]) => SB.el("div", { class: "bar-row" },
      SB.el("span", { class: "bar-name" }, name),
      SB.el("span", { class: "bar-track", "aria-hidden": "true" }, SB.el("span", { class: "bar-fill", style: { width: `${(100 * (value ?? 0)) / top}%` } })),
      SB.el("span", { class: "bar-value" }, words))));
  }

  function groups(run) {
    return part("By group: seconds an image", bars(run.groups.map((group) => [group.name, group.seconds_per_image, number(group.seconds_per_image, 3)])),
      table(["Group", "Jobs", "Images", "Batches", "Time", "s an image", "tok/s"], run.groups.map((group) => [group.name, SB.count(group.jobs), SB.count(group.images), SB.count(group.calls), seconds(group.wall_s), number(group.seconds_per_image, 3), number(group.image_tok_per_s)])), { manyNumbers: true });
  }

  function waits(run) {
    return part("Longest waits between batches", bars(run.waits.map((one) => [one.name, one.wait_s, seconds(one.wait_s)])),
      table(["Before", "At", "Waited"], run.waits.map((one) => [one.name, seconds(one.at_s), seconds(one.wait_s)])));
  }
})();
