// The boundary to Python: a function of the C interface returns null or an error message, and no exception leaves it.
#pragma once

#include <cstdio>
#include <exception>
#include <new>
#include <stdexcept>

namespace erniem_fast {

// Copies a message; the copy is valid until the thread's next error.
inline const char* copy_of(const char* message) {
  static thread_local char copy[512];
  snprintf(copy, sizeof copy, "%s", message);
  return copy;
}

// Runs `body`; returns null, or the message of the exception that it threw.
template <typename Body>
const char* error_of(const Body& body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::bad_alloc&) {
    return "there is not enough memory for intermediate results";
  } catch (const std::exception& error) {
    return copy_of(error.what());
  } catch (...) {
    return "unknown error";
  }
}

// Used when a function of the C interface calls another one.
inline void throw_if(const char* error) {
  if (error != nullptr) throw std::runtime_error(error);
}

}  // namespace erniem_fast
