
"use strict";
// Shows, searches and sorts the cards of the page. Without this script the page shows all cards, the best first.
(() => {
  const main = document.querySelector("main");
  const find = (id) => document.getElementById(id);
  const cards = Array.from(main.children, (element) => {
    const words = Array.from(element.querySelectorAll("h2, li, p"), (part) => part.textContent);
    return {
      element,
      views: element.dataset.views.split(" "),
      text: words.join("\n").toLowerCase(),
      name: words[words.length - 1],
      drawn: element.dataset.drawn === undefined ? null : Number(element.dataset.drawn),
      cider: Number(element.dataset.cider),
      rougeL: Number(element.dataset.rougeL),
      logProbability: Number(element.dataset.logProbability),
    };
  });
  const views = {
    random: { holds: (card) => card.drawn !== null, order: "drawn up" },
    best: { holds: (card) => card.views.includes("best"), order: "cider down" },
    worst: { holds: (card) => card.views.includes("worst"), order: "cider up" },
    all: { holds: () => true, order: "cider down" },
  };

  const compare = (order) => {
    const [key, direction] = order.split(" ");
    const sign = direction === "up" ? 1 : -1;
    return (a, b) => sign * (key === "name" ? a.name.localeCompare(b.name) : a[key] - b[key]);
  };

  // Return whether the sought text is at the beginning of a word of the text: "tree" is in "trees", not in "street".
  const holds = (text, sought) => {
    const inner = /[a-z0-9]/;
    for (let at = text.indexOf(sought); at >= 0; at = text.indexOf(sought, at + 1)) {
      if (at === 0 || !inner.test(sought[0]) || !inner.test(text[at - 1])) return true;
    }
    return false;
  };

  const update = () => {
    const view = views[document.querySelector("input[name=view]:checked").value];
    const sought = find("search").value.toLowerCase().split(/\s+/).filter(Boolean);
    const score = find("score").value;
    const bound = (id, none) => (find(id).value === "" ? none : Number(find(id).value));
    const least = bound("least", -Infinity);
    const most = bound("most", Infinity);
    const held = cards.filter(view.holds);
    const found = held.filter(
      (card) => sought.every((word) => holds(card.text, word)) && card[score] >= least && card[score] <= most,
    );
    for (const card of cards) card.element.hidden = true;
    for (const card of found.sort(compare(find("order").value || view.order))) {
      card.element.hidden = false;
      main.append(card.element);
    }
    find("count").textContent = `${found.length} of ${held.length} photos`;
  };

  // Attention maps: a caption's words become buttons, which light the photo where the attention was for the word.
  const digits = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";

  const darken = (canvas, levels, side) => {
    const grid = new ImageData(side, side); // black; the brighter the map, the more transparent
    levels.forEach((level, place) => (grid.data[4 * place + 3] = 255 * 0.85 * (1 - level / 63)));
    const small = Object.assign(document.createElement("canvas"), { width: side, height: side });
    small.getContext("2d").putImageData(grid, 0, 0);
    const context = canvas.getContext("2d");
    context.imageSmoothingQuality = "high";
    context.clearRect(0, 0, canvas.width, canvas.height);
    context.drawImage(small, 0, 0, canvas.width, canvas.height);
  };

  const tellWords = (article) => {
    const photo = article.querySelector("img");
    const heading = article.querySelector("h2");
    const levels = Array.from(article.dataset.looked, (digit) => digits.indexOf(digit));
    const words = heading.textContent.split(" ");
    const places = levels.length / words.length;
    const side = Math.sqrt(places);
    const size = { width: photo.getAttribute("width"), height: photo.getAttribute("height") };
    const canvas = Object.assign(document.createElement("canvas"), size);
    canvas.hidden = true;
    photo.after(canvas);
    let kept = null; // the word that was tapped, pressed or is in focus
    const show = (at) => {
      canvas.hidden = at === null;
      buttons.forEach((button, place) => button.setAttribute("aria-pressed", place === at));
      if (at !== null) darken(canvas, levels.slice(at * places, (at + 1) * places), side);
    };
    const keep = (at) => show((kept = at));
    const buttons = words.map((word, at) => {
      const button = Object.assign(document.createElement("button"), { type: "button", textContent: word });
      button.tabIndex = at === 0 ? 0 : -1; // a caption is one stop of the Tab key
      button.addEventListener("pointerenter", (event) => event.pointerType === "mouse" && show(at));
      button.addEventListener("pointerleave", (event) => event.pointerType === "mouse" && show(kept));
      button.addEventListener("focus", () => button.matches(":focus-visible") && keep(at));
      button.addEventListener("blur", () => keep(null));
      button.addEventListener("click", () => keep(kept === at ? null : at));
      return button;
    });
    heading.addEventListener("keydown", (event) => {
      const at = buttons.indexOf(document.activeElement);
      const to = { ArrowLeft: at - 1, ArrowRight: at + 1, Home: 0, End: buttons.length - 1 }[event.key];
      if (event.key === "Escape") keep(null);
      if (at < 0 || !buttons[to]) return;
      event.preventDefault();
      buttons[at].tabIndex = -1;
      buttons[to].tabIndex = 0;
      buttons[to].focus({ focusVisible: true });
    });
    heading.replaceChildren(...buttons.flatMap((button, at) => (at ? [" ", button] : [button])));
  };
  main.querySelectorAll("article[data-looked]:not([data-looked=''])").forEach(tellWords);

  find("controls").addEventListener("input", update);
  for (const id of ["order", "score"]) find(id).addEventListener("change", update); // WebDriver fires only this event
  find("clear").addEventListener("click", () => {
    for (const id of ["search", "least", "most", "order"]) find(id).value = "";
    find("score").selectedIndex = 0;
    update();
    find("search").focus();
  });
  find("plain").hidden = true;
  find("controls").hidden = false;
  update();
})();
