// What the drawers of the page show: quality reports, and addresses for a phone.

import { fetched } from "./api.js";
import { markdown } from "./markdown.js";

export function node(tag, kind, ...children) {
  const made = document.createElement(tag);
  if (kind) made.className = kind;
  made.append(...children);
  return made;
}

export async function report(place, ids) {
  place.className = "text";
  place.replaceChildren(node("p", "quiet", "Loading"));
  try {
    const parts = [];
    for (const id of ids) {
      const card = await (await fetched(`/v1/models/${encodeURIComponent(id)}/card`)).json();
      if (card.markdown === null) parts.push(node("p", "quiet", `${id} is no file of edgeq quantize, so it has no report.`));
      else parts.push(...markdown(card.markdown.replace(/^---\n[\s\S]*?\n---\n/, "")));
    }
    place.replaceChildren(...parts);
  } catch (fault) {
    place.replaceChildren(node("p", "fault", fault.message));
  }
}

export async function phone(place) {
  place.replaceChildren(node("p", "quiet", "Loading"));
  try {
    const found = await (await fetched("/phone")).json();
    const parts = found.addresses.map((one) => {
      const caption = node("figcaption", "", one.url);
      if (!one.qr) return node("figure", "code-figure", caption);
      const image = node("img");
      image.src = one.qr;
      image.alt = `QR code of ${one.url}`;
      return node("figure", "code-figure", image, caption);
    });
    if (found.addresses.some((one) => one.qr)) parts.unshift(node("p", "quiet", "Point the phone's camera at the code. The phone must be in the same network."));
    if (found.reason) parts.push(node("p", "quiet", found.reason));
    place.replaceChildren(...parts);
  } catch (fault) {
    place.replaceChildren(node("p", "fault", fault.message));
  }
}
