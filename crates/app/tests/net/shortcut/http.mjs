// Node's HTTP server and its client with kept connections: node http.mjs ADDRESS COUNT.
// Bodies of many sizes go both ways; prints how many came back the same.
import http from "node:http";
import { createHash, randomBytes } from "node:crypto";

const [address, count] = [process.argv[2], Number(process.argv[3])];
const server = http.createServer((request, response) => {
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("end", () => response.end(Buffer.concat(pieces).reverse()));
});
const agent = new http.Agent({ keepAlive: true, maxSockets: 4 });
const hash = (body) => createHash("sha256").update(body).digest("hex");

function post(port, body) {
  return new Promise((resolve, reject) => {
    const request = http.request({ host: address, port, agent, method: "POST" }, (response) => {
      const pieces = [];
      response.on("data", (piece) => pieces.push(piece));
      response.on("end", () => resolve(Buffer.concat(pieces)));
    });
    request.on("error", reject);
    request.end(body);
  });
}

server.listen(0, address, async () => {
  let good = 0;
  const one = async (number) => {
    const body = randomBytes(Math.floor(500_000 ** ((number % 100) / 100)));
    const back = await post(server.address().port, body);
    good += hash(back.reverse()) === hash(body) ? 1 : 0;
  };
  for (let number = 0; number < count; number += 4) {
    await Promise.all([0, 1, 2, 3].map((i) => one(number + i)));
  }
  agent.destroy();
  server.close();
  console.log(good);
});
