// The score rule cap * tanh(score / cap), for every target.
#pragma once

namespace attention {

template <class C>
struct SoftCap {
  FUSER_INLINE Number apply(Number score) { return C::kCap * tanh(score * (1.0f / C::kCap)); }
};

}  // namespace attention
