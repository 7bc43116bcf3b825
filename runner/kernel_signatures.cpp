#include "runner/kernel_signatures.h"

#include <map>
#include <stdexcept>

namespace et_moe {

std::string_view kernel_signature(const std::string& name) {
  // Results come last, twice: as an argument and as what is returned.
  static const std::map<std::string_view, std::string_view> signatures = {
      {"aten::_to_copy.out", "tbmtt"},
      {"aten::add.out", "ttntt"},
      {"aten::arange.start_out", "nnntt"},
      {"aten::cat.out", "sitt"},
      {"aten::embedding.out", "ttibbtt"},
      {"aten::eq.Tensor_out", "tttt"},
      {"aten::full.out", "lntt"},
      {"aten::gt.Scalar_out", "tntt"},
      {"aten::index_select.out", "tittt"},
      {"aten::mul.out", "tttt"},
      {"aten::remainder.Scalar_out", "tntt"},
      {"aten::sigmoid.out", "ttt"},
      {"aten::split_with_sizes_copy.out", "tliss"},
      {"aten::sub.out", "ttntt"},
      {"aten::sum.IntList_out", "tLbmtt"},
      {"aten::view_copy.out", "tltt"},
      {"aten::where.self_out", "ttttt"},
      {"executorch_prim::et_view.default", "tlt"},
  };
  if (name.rfind("et_moe::", 0) == 0) return "*";
  const auto found = signatures.find(name);
  if (found == signatures.end()) {
    throw std::runtime_error("it calls the kernel " + name.substr(0, 100) +
                             ", which is none that `et-moe export` uses");
  }
  return found->second;
}

}  // namespace et_moe
