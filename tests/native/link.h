// SPDX-License-Identifier: Apache-2.0
//
// One end of a link. Each end asks on one connection and answers on another: where memory is, and for bytes out of it and into it.
#pragma once

#include <atomic>
#include <functional>
#include <mutex>
#include <optional>
#include <thread>
#include <vector>

#include "caches.h"
#include "socket.h"

namespace standin {

struct Piece {
  uint64_t local;
  uint64_t remote;
  uint64_t bytes;
};

enum class Direction { kPull, kPush };

class Link {
 public:
  explicit Link(Caches &ours) : ours_(ours) {}
  ~Link() { end(); }

  // end waits for the transfer that is under way and closes both connections. It may be called more than once.
  void end();

  // answer_on and ask_on each take one of the two connections. A transfer that begins once the peer was welcomed finds its connection.
  void answer_on(Socket socket);
  void ask_on(Socket socket, const std::function<void(Socket &)> &welcome);

  // live tells whether the peer has not gone away.
  bool live() const { return !gone_; }

  // transfer moves the pieces that plan makes of the peer's cache, as the peer's table had it at the first transfer. It throws a Failure.
  void transfer(Direction direction, int64_t remote_cache, Deadline deadline,
                const std::function<std::vector<Piece>(const Entry &)> &plan);

 private:
  void answer();
  void move(Direction direction, const Piece &piece, Deadline deadline);
  Table fetch_table(Deadline deadline);

  Caches &ours_;
  std::atomic<bool> gone_{false};

  std::mutex guard_;  // guards the rest, and makes transfers follow one another
  Socket answering_;  // once set the answerer's own, but for its end
  std::thread answerer_;
  Socket asking_;
  bool broken_ = false;  // a transfer has ended in the middle: what comes next on the connection means nothing
  std::optional<Table> table_;
};

}  // namespace standin
