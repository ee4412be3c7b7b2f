// The boundary to Python: a function of the C interface returns null or an error message, and no exception leaves it.
#pragma once

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

namespace erniem_fast {

// A message that is valid until the thread's next error.
inline const char* keep(const char* message) {
  static thread_local char kept[512];
  snprintf(kept, sizeof kept, "%s", message);
  return kept;
}

// Runs `body`; returns null, or the message of what it threw.
template <typename Body>
const char* error_of(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "there is not enough memory for intermediate results";
  } catch (const std::exception& error) {
    return keep(error.what());
  } catch (...) {
    return "unknown error";
  }
}

// For a function of the C interface that calls another.
inline void throw_if(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

}  // namespace erniem_fast
