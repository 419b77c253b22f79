// The table of contents of the native library: every raw kernel's schema, the same on every device.
// Kernels are registered where they are written (cpu/, cuda/); only Python defines pykern:: ops.
// The namespace is pykern_native because a second definition of one namespace raises.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(pykern_native, m) {
  m.def("layer_norm(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor y, Tensor mean, Tensor rstd)");
  m.def(
      "layer_norm_backward(Tensor? dy, Tensor x, Tensor? weight, Tensor? bias, float eps, Tensor mean, Tensor rstd,"
      " bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "rms_norm(Tensor x, Tensor? weight, float eps, float weight_offset, bool round_before_weight)"
      " -> (Tensor y, Tensor rstd)");
  m.def(
      "rms_norm_backward(Tensor? dy, Tensor x, Tensor? weight, float eps, float weight_offset,"
      " bool round_before_weight, Tensor rstd, bool[2] output_mask) -> (Tensor dx, Tensor dweight)");
  m.def(
      "add_layer_norm(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps)"
      " -> (Tensor y, Tensor summed, Tensor mean, Tensor rstd)");
  m.def(
      "add_layer_norm_backward(Tensor? dy, Tensor? dsummed, Tensor summed, Tensor? weight, Tensor? bias, float eps,"
      " Tensor mean, Tensor rstd, bool[3] output_mask) -> (Tensor dx, Tensor dweight, Tensor dbias)");
  m.def(
      "add_rms_norm(Tensor x, Tensor residual, Tensor? weight, float eps, float weight_offset,"
      " bool round_before_weight) -> (Tensor y, Tensor summed, Tensor rstd)");
  m.def(
      "add_rms_norm_backward(Tensor? dy, Tensor? dsummed, Tensor summed, Tensor? weight, float eps,"
      " float weight_offset, bool round_before_weight, Tensor rstd, bool[2] output_mask)"
      " -> (Tensor dx, Tensor dweight)");
}
