"use strict";
// Names are only ever written as text (textContent, setAttribute), never as markup.
(() => {
  const { classes, colours, items } = JSON.parse(document.getElementById("payload").textContent);
  const grid = document.getElementById("grid");
  if (!grid) return;
  const STEP = 60; // cards that are made at once
  const byId = (id) => document.getElementById(id);
  const make = (tag, className, text) => {
    const element = document.createElement(tag);
    if (className) element.className = className;
    if (text !== undefined) element.textContent = text;
    return element;
  };
  const score = (item) => (item.l.length && item.l[0][1] !== null ? item.l[0][1] : 0);
  const verdict = (item) => (item.t < 0 ? "unknown" : item.l.length && item.l[0][0] === item.t ? "right" : "wrong");
  const nameOf = (item) => item.p.split("/").slice(-2).join("/");
  // Each part in a direction of its own: else names of folders and files in Hebrew or Arabic change places.
  const apart = (parts, between) => parts.flatMap((part, k) => [k ? between : "", make("bdi", "", part)]);
  const words = items.map((item) => (item.p + "\n" + item.l.map(([c]) => classes[c]).join("\n")).toLowerCase());

  // --- filters -----------------------------------------------------------------------------------------------------
  const form = byId("filters");
  const value = (id) => (byId(id) ? byId(id).value : "");
  for (const [id, used] of [
    ["class", new Set(items.flatMap((item) => item.l.slice(0, item.a).map(([c]) => c)))],
    ["true", new Set(items.map((item) => item.t))],
  ]) {
    if (!byId(id)) continue;
    for (const c of [...used].filter((c) => c >= 0).sort((a, b) => classes[a].localeCompare(classes[b]))) {
      const option = make("option", "", classes[c]);
      option.value = c;
      byId(id).append(option);
    }
  }
  const orders = {
    first: () => 0, // as they were written
    least: (a, b) => score(items[a]) - score(items[b]),
    most: (a, b) => score(items[b]) - score(items[a]),
    path: (a, b) => items[a].p.localeCompare(items[b].p, undefined, { numeric: true }),
  };
  let shown = [];
  let made = 0;

  function filter() {
    const text = value("text").trim().toLowerCase();
    const said = value("class");
    const truth = value("true");
    const answer = value("answer");
    const low = value("low") === "" ? 0 : +value("low");
    const high = value("high") === "" ? 1 : +value("high");
    const answers = (item) => item.l.slice(0, item.a); // of a classification the first, else all tags
    shown = items.map((_, n) => n).filter((n) => {
      const item = items[n];
      return (
        (!text || words[n].includes(text)) &&
        (said === "" || answers(item).some(([c]) => c === +said)) &&
        (truth === "" || item.t === +truth) &&
        (!answer || verdict(item) === answer) &&
        score(item) >= low - 1e-9 &&
        score(item) <= high + 1e-9
      );
    });
    shown.sort(orders[value("order")] || orders.least);
    byId("count").textContent = !shown.length
      ? `none of ${items.length.toLocaleString("en")} images is like that`
      : shown.length === items.length
        ? `${items.length.toLocaleString("en")} ${items.length === 1 ? "image" : "images"}`
        : `${shown.length.toLocaleString("en")} of ${items.length.toLocaleString("en")} images`;
    grid.replaceChildren();
    made = 0;
    extend();
  }

  function extend() {
    const next = shown.slice(made, made + STEP);
    grid.append(...next.map((n, k) => card(n, made + k)));
    made += next.length;
  }

  // --- cards -------------------------------------------------------------------------------------------------------
  function picture(item, into, first) {
    into.replaceChildren();
    if (!item.i) {
      into.append(make("span", "none", "no picture"));
      return;
    }
    const fit = make("span", "fit");
    const image = make("img");
    image.alt = "";
    image.onload = () => {
      // The picture fills the frame as far as its shape allows; layers lie exactly on it.
      const wide = image.naturalWidth >= image.naturalHeight;
      fit.style.width = wide ? "100%" : `${(100 * image.naturalWidth) / image.naturalHeight}%`;
      fit.style.aspectRatio = `${image.naturalWidth} / ${image.naturalHeight}`;
      if (Math.max(image.naturalWidth, image.naturalHeight) <= 64) image.classList.add("pixelated");
    };
    image.src = item.i;
    fit.append(image);
    item.o.forEach(([label, source], k) => {
      const layer = make("img", k === 0 && first ? "layer first" : "layer");
      layer.alt = "";
      layer.src = source;
      layer.dataset.layer = k;
      if (label === "mask") layer.classList.add("pixelated");
      fit.append(layer);
    });
    into.append(fit);
  }

  function named(c) {
    const text = make("span");
    text.append(...apart([classes[c]]));
    if (colours[c]) {
      const dot = make("span", "dot");
      dot.style.background = colours[c];
      text.prepend(dot);
    }
    return text;
  }

  function meter(share) {
    const bar = make("div", "meter");
    const part = make("span");
    part.style.width = `${100 * Math.max(0, Math.min(1, share))}%`;
    bar.append(part);
    return bar;
  }

  function sentence(item) {
    const said = item.l.length ? classes[item.l[0][0]] : "nothing found";
    const sure = item.l.length && item.l[0][1] !== null ? `, ${item.l[0][1].toFixed(3)}` : "";
    const judged = { right: ", right", wrong: `, wrong, true is ${classes[item.t]}`, unknown: "" }[verdict(item)];
    return `${nameOf(item)}: ${said}${sure}${judged}`;
  }

  function card(n, place) {
    const item = items[n];
    const entry = make("li");
    const button = make("button", "card");
    button.type = "button";
    button.setAttribute("aria-label", sentence(item));
    button.dataset.place = place;
    const frame = make("div", "frame");
    picture(item, frame, true);
    const text = make("div", "words");
    const said = make("div", "said");
    said.append(item.l.length ? named(item.l[0][0]) : make("span", "", "nothing found"));
    if (item.l.length && item.l[0][1] !== null) said.append(make("span", "s", item.l[0][1].toFixed(3)));
    text.append(said);
    if (item.l.length && item.l[0][1] !== null) text.append(meter(item.l[0][1]));
    const judged = verdict(item);
    if (judged === "right") text.append(make("div", "verdict right", "✓ right"));
    if (judged === "wrong") {
      text.append(make("div", "verdict wrong", "✗ true: "));
      text.lastChild.append(...apart([classes[item.t]]));
    }
    if (judged === "unknown" && item.l.length > 1) {
      text.append(make("div", "more"));
      text.lastChild.append(...apart(item.l.slice(1).map(([c]) => classes[c]), ", "));
    }
    text.append(make("div", "file"));
    text.lastChild.append(...apart(nameOf(item).split("/"), "/"));
    button.title = item.p;
    button.append(frame, text);
    button.addEventListener("click", () => open(place));
    entry.append(button);
    return entry;
  }

  // --- one image ---------------------------------------------------------------------------------------------------
  const dialog = byId("detail");
  let current = 0;

  function open(place) {
    current = place;
    const item = items[shown[place]];
    byId("d-name").replaceChildren(...apart(item.p.split("/"), "/"));
    picture(item, byId("d-frame"), false);
    const judged = verdict(item);
    byId("d-truth").textContent = { right: "✓ right", wrong: `✗ wrong, true: ${classes[item.t]}`, unknown: "" }[judged];
    byId("d-truth").className = `verdict ${judged}`;
    byId("d-labels").replaceChildren(
      ...item.l.map(([c, s]) => {
        const row = make("tr");
        const bar = make("td");
        if (s !== null) bar.append(meter(s));
        const label = make("td");
        label.append(named(c));
        row.append(label, bar, make("td", "n", s === null ? "" : s.toFixed(4)));
        return row;
      }),
    );
    const layers = [...byId("d-frame").querySelectorAll(".layer")];
    byId("d-layers").replaceChildren(
      ...layers.map((layer, k) => {
        const button = make("button", "", item.o[k][0] === "mask" ? "mask" : `where: ${item.o[k][0]}`);
        button.type = "button";
        const press = (on) => {
          layer.classList.toggle("on", on);
          button.setAttribute("aria-pressed", on);
        };
        press(k === 0);
        button.addEventListener("click", () => press(button.getAttribute("aria-pressed") !== "true"));
        return button;
      }),
    );
    byId("d-place").textContent = `${(place + 1).toLocaleString("en")} of ${shown.length.toLocaleString("en")}`;
    // Not "disabled": that takes the focus from the button, and the arrow keys from the dialog.
    byId("d-previous").setAttribute("aria-disabled", place === 0);
    byId("d-next").setAttribute("aria-disabled", place === shown.length - 1);
    if (!dialog.open) dialog.showModal();
  }

  const turn = (by) => {
    if (shown[current + by] !== undefined) open(current + by);
  };
  byId("d-close").addEventListener("click", () => dialog.close());
  byId("d-previous").addEventListener("click", () => turn(-1));
  byId("d-next").addEventListener("click", () => turn(1));
  dialog.addEventListener("keydown", (event) => {
    if (event.key === "ArrowLeft") turn(-1);
    if (event.key === "ArrowRight") turn(1);
  });
  dialog.addEventListener("click", (event) => {
    if (event.target === dialog) dialog.close(); // beside it
  });
  dialog.addEventListener("close", () => {
    const card = grid.querySelector(`[data-place="${current}"]`);
    if (card) card.focus();
  });

  // --- what starts it ------------------------------------------------------------------------------------------------
  // A choice is told by "change" alone where no person makes it, such as a screen reader's or a driver's.
  form.addEventListener("input", (event) => event.target.tagName !== "SELECT" && filter());
  form.addEventListener("change", (event) => event.target.tagName === "SELECT" && filter());
  form.addEventListener("submit", (event) => event.preventDefault());
  form.addEventListener("reset", () => setTimeout(filter));
  for (const button of document.querySelectorAll("table [data-class]")) {
    button.addEventListener("click", () => {
      form.classList.remove("unneeded"); // from here on: it has the way back
      form.reset();
      byId("class").value = button.dataset.class;
      if (button.dataset.true !== undefined && byId("true")) byId("true").value = button.dataset.true;
      setTimeout(() => {
        byId("class").value = button.dataset.class;
        if (button.dataset.true !== undefined && byId("true")) byId("true").value = button.dataset.true;
        filter();
        byId("images").scrollIntoView();
        byId("class").focus({ preventScroll: true });
      });
    });
  }
  new IntersectionObserver((seen) => {
    if (seen.some((one) => one.isIntersecting) && made < shown.length) extend();
  }, { rootMargin: "1200px" }).observe(byId("more"));
  filter();
})();
