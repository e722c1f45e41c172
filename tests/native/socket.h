// SPDX-License-Identifier: Apache-2.0
//
// Sockets with deadlines, which carry plain structs between the two ends of the stand-in.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

namespace standin {

using Deadline = std::chrono::steady_clock::time_point;

inline Deadline in_millis(int64_t millis) { return std::chrono::steady_clock::now() + std::chrono::milliseconds(millis); }
constexpr Deadline kNever = Deadline::max();

// What a socket throws.
struct Broken {};
struct TimedOut {};

class Socket {
 public:
  Socket() = default;
  explicit Socket(int fd) : fd_(fd) {}
  Socket(Socket &&other) noexcept;
  Socket &operator=(Socket &&other) noexcept;
  ~Socket();

  static Socket connect(const std::string &ip, uint16_t port, Deadline deadline);
  static Socket listen(const std::string &ip, uint16_t port);
  Socket accept();

  void read(void *into, uint64_t bytes, Deadline deadline);
  void write(const void *from, uint64_t bytes, Deadline deadline);
  template <typename T>
  T read(Deadline deadline) {
    T value;
    read(&value, sizeof value, deadline);
    return value;
  }
  template <typename T>
  void write(const T &value, Deadline deadline) {
    write(&value, sizeof value, deadline);
  }

  // shut ends all reading and writing, also of other threads and of the peer.
  void shut();
  bool open() const { return fd_ >= 0; }

 private:
  void wait(short events, Deadline deadline);

  int fd_ = -1;
};

}  // namespace standin
