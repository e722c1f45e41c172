// SPDX-License-Identifier: Apache-2.0
// The floor of a small pull over sockets: a request and its answer over one loopback connection with cubic, both ends asleep in read.
// usage: pingpong <W..> [...]; the answer has the bytes of one call of the workload. Prints what limit prints.
#include "wl.h"
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <arpa/inet.h>

#define REQUEST 160 // bytes of the library's request for one block

static void tune(int s) {
  int one = 1;
  setsockopt(s, IPPROTO_TCP, TCP_NODELAY, &one, sizeof one);
  if (setsockopt(s, IPPROTO_TCP, TCP_CONGESTION, "cubic", 5)) perror("TCP_CONGESTION");
}

static void serve(int s, char *answer, size_t bytes) {
  char request[REQUEST];
  for (;;) {
    for (size_t have = 0; have < sizeof request;) {
      ssize_t n = read(s, request + have, sizeof request - have);
      if (n <= 0) _exit(0);
      have += n;
    }
    xwrite(s, answer, bytes);
  }
}

static void run(const wl_t *w) {
  size_t bytes = wl_bytes(w);
  char request[REQUEST] = {0}, *memory = alloc_mem(bytes, 0);
  struct sockaddr_in at = {.sin_family = AF_INET, .sin_addr.s_addr = htonl(INADDR_LOOPBACK)};
  socklen_t size = sizeof at;
  int listener = socket(AF_INET, SOCK_STREAM, 0);
  tune(listener); // before the connection: one that was made under a pacing algorithm stays paced
  if (bind(listener, (void *)&at, sizeof at) || listen(listener, 1) || getsockname(listener, (void *)&at, &size)) { perror("listen"); _exit(2); }
  pid_t owner = fork();
  if (!owner) {
    memset(memory, 0x5A, bytes);
    int s = accept(listener, 0, 0);
    tune(s);
    serve(s, memory, bytes);
  }
  int s = socket(AF_INET, SOCK_STREAM, 0);
  tune(s);
  if (connect(s, (void *)&at, sizeof at)) { perror("connect"); _exit(2); }
  uint64_t *samples = calloc(w->iters, sizeof *samples);
  for (int i = -w->warm; i < w->iters; i++) {
    uint64_t began = now_ns();
    xwrite(s, request, sizeof request);
    xread(s, memory, bytes);
    if (i >= 0) samples[i] = now_ns() - began;
  }
  for (size_t i = 0; i < bytes; i++) if (memory[i] != 0x5A) { fprintf(stderr, "VERIFY FAIL %s byte %zu\n", w->name, i); _exit(3); }
  emit("pingpong", w, "e2e", samples, w->iters);
  close(s);
  int status;
  waitpid(owner, &status, 0);
  _exit(0);
}

int main(int count, char **args) {
  if (count < 2) return fprintf(stderr, "usage: pingpong <W..> [...]\n"), 1;
  int failed = 0;
  for (int i = 1; i < count; i++) {
    const wl_t *w = wl_find(args[i]);
    if (!w) return fprintf(stderr, "no workload %s\n", args[i]), 1;
    fflush(stdout);
    pid_t child = fork();
    if (!child) run(w);
    int status;
    waitpid(child, &status, 0);
    if (status) failed = 1;
  }
  return failed;
}
