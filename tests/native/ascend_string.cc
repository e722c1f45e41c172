// SPDX-License-Identifier: Apache-2.0

#include "ascend_string.h"

namespace ge {

AscendString::AscendString(const char *text) {
  if (text != nullptr) name_ = std::make_shared<std::string>(text);
}

AscendString::AscendString(const char *text, size_t bytes) {
  if (text != nullptr) name_ = std::make_shared<std::string>(text, bytes);
}

const char *AscendString::GetString() const { return name_ != nullptr ? name_->c_str() : ""; }

size_t AscendString::GetLength() const { return name_ != nullptr ? name_->size() : 0; }

// A null string stands before everything and equals another null one.
bool AscendString::operator<(const AscendString &other) const {
  if (name_ == nullptr || other.name_ == nullptr) return name_ == nullptr && other.name_ != nullptr;
  return *name_ < *other.name_;
}

}  // namespace ge
