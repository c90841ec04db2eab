// What was chosen last. Host logic alone.

#pragma once

#include <mutex>
#include <optional>
#include <utility>

namespace qkernels::bindings {

// For choices that take longer than comparing keys, and are asked for by the same key again and
// again. On any thread.
template <class Key, class Choice>
class LastChoice {
 public:
  // The choice for `key`: that of `choose`, which is not called where it was for the same key last.
  // What it throws changes nothing.
  template <class Choose>
  Choice get(const Key& key, const Choose& choose) {
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      if (last_ && last_->first == key) return last_->second;
    }
    const Choice choice = choose();
    const std::lock_guard<std::mutex> lock(mutex_);
    last_ = std::make_pair(key, choice);
    return choice;
  }

 private:
  std::mutex mutex_;
  std::optional<std::pair<Key, Choice>> last_;
};

}  // namespace qkernels::bindings
