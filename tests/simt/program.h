// A program of kernels under the SIMT shim:   PROGRAM CASE ORDER
// Prints "right", "wrong", or "error: " and what the shim says.
#pragma once
#include <cstdio>
#include <initializer_list>
#include <string>

#include "common/simt/simt.h"

struct Case {
  const char* name;
  bool (*is_right)();
};

inline int run(char** argv, std::initializer_list<Case> cases) {
  using namespace mfac_kernels;
  const std::string name = argv[1], order = argv[2];
  simt::set_order(order == "forward" ? simt::Order::forward : order == "reverse" ? simt::Order::reverse : simt::Order::random);
  for (const Case& one : cases) {
    if (name != one.name) continue;
    try {
      std::puts(one.is_right() ? "right" : "wrong");
    } catch (const simt::Error& error) {
      std::printf("error: %s\n", error.what());
    }
    return 0;
  }
  return 1;
}
