// What a program and its weights must agree in, so that files of different exports are told apart.
#pragma once

#include <string>

namespace et_moe {

/// What the export wrote of the model into one of its files: a JSON object, `fingerprint` in
/// pipeline/export.py.
struct Fingerprint {
  std::string path, text;
};

/// Throws std::runtime_error that names both files and the first key in which they differ.
void check_same(const Fingerprint& program, const Fingerprint& weights);

}  // namespace et_moe
