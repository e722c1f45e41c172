// SPDX-License-Identifier: Apache-2.0
//
// The documented string class, as libmetadef.so of the stand-in exports it.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <string>

namespace ge {

class __attribute__((visibility("default"))) AscendString {
 public:
  AscendString() = default;
  AscendString(const char *text);
  AscendString(const char *text, size_t bytes);
  const char *GetString() const;
  size_t GetLength() const;
  bool operator<(const AscendString &other) const;

 private:
  std::shared_ptr<std::string> name_;
#ifdef STANDIN_WIDE_STRING  // a library of another ABI, for the test of what is said then
  uint64_t more_ = 0;
#endif
};

}  // namespace ge
