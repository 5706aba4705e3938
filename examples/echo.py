"""Answers HTTP on port 8080 and UDP on port 8081 with its own name and the address it was asked from.

usage: python3 echo.py NAME ADDRESS
"""

import http.server
import socket
import sys
import threading

name, address = sys.argv[1:]


def answer(client):
    return f"{name} was asked from {client[0]}\n".encode()


class Echo(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        body = answer(self.client_address)
        self.send_response(200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


def serve_udp():
    while True:
        _, client = udp.recvfrom(2048)
        udp.sendto(answer(client), client)


udp = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
udp.bind((address, 8081))
threading.Thread(target=serve_udp, daemon=True).start()
http.server.ThreadingHTTPServer((address, 8080), Echo).serve_forever()
