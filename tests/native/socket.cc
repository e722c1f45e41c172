// SPDX-License-Identifier: Apache-2.0

#include "socket.h"

#include <arpa/inet.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <sys/socket.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <utility>

namespace standin {
namespace {

int tcp() { return ::socket(AF_INET, SOCK_STREAM | SOCK_CLOEXEC | SOCK_NONBLOCK, 0); }

sockaddr_in ipv4(const std::string &ip, uint16_t port) {
  sockaddr_in address{};
  address.sin_family = AF_INET;
  address.sin_port = htons(port);
  if (inet_pton(AF_INET, ip.c_str(), &address.sin_addr) != 1) throw Broken{};
  return address;
}

const sockaddr *plain(const sockaddr_in &address) { return reinterpret_cast<const sockaddr *>(&address); }

void hurry(int fd) {
  const int yes = 1;
  setsockopt(fd, IPPROTO_TCP, TCP_NODELAY, &yes, sizeof yes);
}

}  // namespace

Socket::Socket(Socket &&other) noexcept : fd_(std::exchange(other.fd_, -1)) {}

Socket &Socket::operator=(Socket &&other) noexcept {
  std::swap(fd_, other.fd_);
  return *this;
}

Socket::~Socket() {
  if (fd_ >= 0) close(fd_);
}

Socket Socket::connect(const std::string &ip, uint16_t port, Deadline deadline) {
  const sockaddr_in address = ipv4(ip, port);
  Socket socket(tcp());
  hurry(socket.fd_);
  if (::connect(socket.fd_, plain(address), sizeof address) != 0) {
    if (errno != EINPROGRESS) throw Broken{};
    socket.wait(POLLOUT, deadline);
    int failure = 0;
    socklen_t size = sizeof failure;
    if (getsockopt(socket.fd_, SOL_SOCKET, SO_ERROR, &failure, &size) != 0 || failure != 0) throw Broken{};
  }
  return socket;
}

Socket Socket::listen(const std::string &ip, uint16_t port) {
  const sockaddr_in address = ipv4(ip, port);
  Socket socket(tcp());
  const int yes = 1;
  setsockopt(socket.fd_, SOL_SOCKET, SO_REUSEADDR, &yes, sizeof yes);
  if (bind(socket.fd_, plain(address), sizeof address) != 0 || ::listen(socket.fd_, 128) != 0) throw Broken{};
  return socket;
}

Socket Socket::accept() {
  wait(POLLIN, kNever);
  const int fd = accept4(fd_, nullptr, nullptr, SOCK_CLOEXEC | SOCK_NONBLOCK);
  if (fd < 0) throw Broken{};
  hurry(fd);
  return Socket(fd);
}

void Socket::wait(short events, Deadline deadline) {
  for (;;) {
    int millis = -1;
    if (deadline != kNever) {
      const auto left = std::chrono::duration_cast<std::chrono::milliseconds>(deadline - std::chrono::steady_clock::now()).count();
      millis = static_cast<int>(std::clamp<int64_t>(left + 1, 0, 1 << 30));
    }
    pollfd one{fd_, events, 0};
    const int ready = poll(&one, 1, millis);
    if (ready > 0) return;
    if (ready == 0) throw TimedOut{};
    if (errno != EINTR) throw Broken{};
  }
}

void Socket::read(void *into, uint64_t bytes, Deadline deadline) {
  for (auto *at = static_cast<char *>(into); bytes > 0;) {
    const ssize_t got = recv(fd_, at, bytes, 0);
    if (got > 0) {
      at += got;
      bytes -= static_cast<uint64_t>(got);
    } else if (got < 0 && (errno == EAGAIN || errno == EINTR)) {
      wait(POLLIN, deadline);
    } else {
      throw Broken{};
    }
  }
}

void Socket::write(const void *from, uint64_t bytes, Deadline deadline) {
  for (auto *at = static_cast<const char *>(from); bytes > 0;) {
    const ssize_t sent = send(fd_, at, bytes, MSG_NOSIGNAL);
    if (sent > 0) {
      at += sent;
      bytes -= static_cast<uint64_t>(sent);
    } else if (sent < 0 && (errno == EAGAIN || errno == EINTR)) {
      wait(POLLOUT, deadline);
    } else {
      throw Broken{};
    }
  }
}

void Socket::shut() { ::shutdown(fd_, SHUT_RDWR); }

}  // namespace standin
