#!/usr/bin/env python3
"""Draws connections that survive ten versions: kv_picture.py PATH/TO/kv FILE.svg

Starts the example kv, keeps 8 connections busy, upgrades it nine times, and draws which version answered on which connection.
Exit status 1 if a connection ended or a value was lost.
"""

import re, signal, socket, subprocess, sys, threading, time, os

VERSIONS, CONNECTIONS, EVERY = 10, 8, 1.3
LEFT, TOP, WIDTH, ROW = 100, 40, 740, 20


def client(number, port, stop, seen):
    """Sets and gets one value, and records which version answered at which time."""
    with socket.create_connection(("127.0.0.1", port)) as connection:
        lines = connection.makefile("rw", newline="\n")
        for count in range(1, sys.maxsize):
            lines.write(f"set {number} {count}\nget {number}\nversion\n")
            lines.flush()
            answers = [lines.readline().strip() for _ in range(3)]
            if answers[:2] != ["ok", str(count)]:
                raise RuntimeError(f"connection {number}: {answers}")
            seen.append((time.monotonic(), int(answers[2])))
            if stop.is_set():
                return


def draw(file, seen, start, end):
    x = lambda at: LEFT + WIDTH * (at - start) / (end - start)
    height = TOP + ROW * CONNECTIONS + 30
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {LEFT + WIDTH + 20} {height}" font-family="sans-serif" font-size="12">',
           f'<rect width="100%" height="100%" fill="white"/>']
    for row, answers in enumerate(seen):
        y = TOP + ROW * row
        out.append(f'<text x="{LEFT - 10}" y="{y + 13}" text-anchor="end">connection {row + 1}</text>')
        for version in range(1, VERSIONS + 1):
            times = [at for at, by in answers if by == version]
            out.append(f'<rect x="{x(times[0]):.1f}" y="{y + 3}" width="{x(times[-1]) - x(times[0]):.1f}" height="{ROW - 6}" '
                       f'fill="hsl({200 + 14 * version},60%,{72 - 4 * (version % 2)}%)"/>')
    for version in range(1, VERSIONS + 1):
        first = min(at for answers in seen for at, by in answers if by == version)
        last = max(at for answers in seen for at, by in answers if by == version)
        out.append(f'<text x="{(x(first) + x(last)) / 2:.1f}" y="{TOP - 12}" text-anchor="middle">version {version}</text>')
        if version > 1:
            out.append(f'<path d="M{x(first):.1f} {TOP - 6}V{TOP + ROW * CONNECTIONS}" stroke="#555" stroke-dasharray="3 3"/>')
    count = 3 * sum(map(len, seen))
    out.append(f'<text x="{LEFT}" y="{height - 10}">{end - start:.0f} seconds, {count:,} requests on {CONNECTIONS} connections, '
               f'none of which was closed; no value was lost.</text></svg>')
    with open(file, "w") as svg:
        svg.write("\n".join(out) + "\n")


def main():
    program, file = sys.argv[1:]
    server = subprocess.Popen([program, "127.0.0.1:0"], stderr=subprocess.PIPE, text=True, start_new_session=True)
    said = lambda pattern: next(found for line in server.stderr if (found := re.search(pattern, line)))
    try:
        port = int(said(r"^listening \S+:(\d+) ")[1])
        pid = int(said(r"^serving gen=1 pid=(\d+)")[1])
        stop, seen = threading.Event(), [[] for _ in range(CONNECTIONS)]
        clients = [threading.Thread(target=client, args=(n, port, stop, seen[n])) for n in range(CONNECTIONS)]
        start = time.monotonic()
        [thread.start() for thread in clients]
        for version in range(2, VERSIONS + 1):
            time.sleep(EVERY)
            os.kill(pid, signal.SIGHUP)
            pid = int(said(rf"^serving gen={version} pid=(\d+)")[1])
        time.sleep(EVERY)
        stop.set()
        [thread.join() for thread in clients]
        if any(answers[-1][1] != VERSIONS for answers in seen):
            sys.exit("a connection did not survive until the last version")
        draw(file, seen, start, time.monotonic())
    finally:
        os.killpg(server.pid, signal.SIGKILL)


main()
