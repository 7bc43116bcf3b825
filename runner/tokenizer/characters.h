// Classes of characters that Hugging Face's added tokens ask for: those of Rust's crate `regex`.
#pragma once

namespace et_moe {

/// `\w`: letters, marks, decimal and letter-like numbers, connecting punctuation and joiners.
bool is_word_character(char32_t code_point);

/// `\s`: what has Unicode's property White_Space.
bool is_white_space(char32_t code_point);

}  // namespace et_moe
