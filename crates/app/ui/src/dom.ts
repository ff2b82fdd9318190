/** The element with an id; the page has it. */
export const by = <T extends HTMLElement>(id: string): T => document.getElementById(id) as T;

/** A new element. Text is text: nothing here is ever parsed as HTML. */
export function make<K extends keyof HTMLElementTagNameMap>(
  tag: K,
  properties: { class?: string; text?: string; role?: string } = {},
  ...children: Node[]
): HTMLElementTagNameMap[K] {
  const element = document.createElement(tag);
  if (properties.class) element.className = properties.class;
  if (properties.text !== undefined) element.textContent = properties.text;
  if (properties.role) element.setAttribute("role", properties.role);
  element.append(...children);
  return element;
}

/** Sets a text where it has changed: layout is not for free. */
export function put(element: HTMLElement, text: string): void {
  if (element.textContent !== text) element.textContent = text;
}
