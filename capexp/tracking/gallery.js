
"use strict";
// Shows, searches and orders the cards that stand in the page; without it all of them stand there, the best first.
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

  // Whether the text holds the sought one from a word's beginning: "tree" is in "trees", not in "street".
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

  find("controls").addEventListener("input", update);
  for (const id of ["order", "score"]) find(id).addEventListener("change", update); // what WebDriver fires alone
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
