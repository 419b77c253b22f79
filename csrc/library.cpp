// The table of contents of the native library: every raw kernel's schema, the same on every device.
// Kernels are registered where they are written (cpu/, cuda/); only Python defines pykern:: ops.
// The namespace is not pykern because a second definition of one namespace raises; the emulated library, which holds
// the same kernels, has one of its own.

#include <torch/csrc/stable/library.h>

#include "tensors.h"

extern "C" __attribute__((visibility("default"))) void pykern_poison_memory(bool on) { pykern::poison_memory = on; }

#ifndef PYKERN_NAMESPACE
#define PYKERN_NAMESPACE pykern_native
#endif
#define PYKERN_LIBRARY(name, m) STABLE_TORCH_LIBRARY(name, m)
// A 4-bit weight, as pykern.ops._weight4bit.SCHEMA has it.
#define PYKERN_WEIGHT_4BIT                                                                                   \
  "Tensor codes, Tensor absmax, Tensor? nested_absmax, Tensor? nested_code, Tensor? nested_offset, Tensor? code," \
  " Tensor? zero_points, int[] shape, int blocksize"
// A low-rank adapter, and a stack of them of which every row of the input names one.
#define PYKERN_LORA \
  "Tensor lora_a, Tensor lora_b, Tensor? bias, Tensor? dora_scale, float scaling, float dropout_p, Tensor? rng"
#define PYKERN_MULTI_LORA "Tensor lora_a, Tensor lora_b, Tensor adapter_ids, Tensor? bias, Tensor scaling"
#define PYKERN_GROUPED_MM \
  "Tensor mat_a, Tensor mat_b, Tensor? offs, Tensor? bias, ScalarType? out_dtype, Tensor? gather, Tensor? scatter"

PYKERN_LIBRARY(PYKERN_NAMESPACE, m) {
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
  m.def(
      "attention(Tensor query, Tensor key, Tensor value, Tensor? attn_mask, Tensor? alibi_slopes, Tensor? sinks,"
      " Tensor? rng, float dropout_p, float scale, bool enable_gqa, int? window_left, int? window_right,"
      " float? softcap, str align) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_backward(Tensor? dout, Tensor? dlse, Tensor query, Tensor key, Tensor value, Tensor? attn_mask,"
      " Tensor? alibi_slopes, Tensor? sinks, Tensor? rng, float dropout_p, float scale, bool enable_gqa,"
      " int? window_left, int? window_right, float? softcap, str align, Tensor out, Tensor lse, bool[6] output_mask)"
      " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dattn_mask, Tensor dalibi_slopes, Tensor dsinks)");
  m.def(
      "attention_varlen(Tensor query, Tensor key, Tensor value, Tensor cu_seqlens_q, Tensor cu_seqlens_k,"
      " int max_seqlen_q, int max_seqlen_k, Tensor? alibi_slopes, Tensor? sinks, Tensor? seqused_k,"
      " Tensor? block_table, Tensor? rng, float dropout_p, float scale, int? window_left, int? window_right,"
      " float? softcap) -> (Tensor out, Tensor lse)");
  m.def(
      "attention_varlen_backward(Tensor? dout, Tensor? dlse, Tensor query, Tensor key, Tensor value,"
      " Tensor cu_seqlens_q, Tensor cu_seqlens_k, int max_seqlen_q, int max_seqlen_k, Tensor? alibi_slopes,"
      " Tensor? sinks, Tensor? seqused_k, Tensor? block_table, Tensor? rng, float dropout_p, float scale,"
      " int? window_left, int? window_right, float? softcap, Tensor out, Tensor lse, bool[5] output_mask)"
      " -> (Tensor dquery, Tensor dkey, Tensor dvalue, Tensor dalibi_slopes, Tensor dsinks)");
  m.def(
      "attention_decode(Tensor query, Tensor key_cache, Tensor value_cache, Tensor cache_seqlens, Tensor? block_table,"
      " Tensor? alibi_slopes, Tensor? sinks, float scale, int? window_left, float? softcap)"
      " -> (Tensor out, Tensor lse)");
  m.def("quantize_4bit(Tensor weight, str quant_type, int blocksize) -> (Tensor codes, Tensor absmax)");
  m.def(
      "quantize_int4(Tensor weight, int blocksize, bool symmetric, ScalarType scale_dtype)"
      " -> (Tensor codes, Tensor scales, Tensor zero_points)");
  m.def("dequantize_4bit(" PYKERN_WEIGHT_4BIT ", ScalarType dtype) -> Tensor weight");
  m.def("linear_4bit(Tensor input, " PYKERN_WEIGHT_4BIT ", Tensor? bias) -> Tensor y");
  m.def(
      "linear_4bit_backward(Tensor? dy, Tensor input, " PYKERN_WEIGHT_4BIT ", Tensor? bias, bool[2] output_mask)"
      " -> (Tensor dinput, Tensor dbias)");
  m.def("lora_linear(Tensor input, Tensor weight, " PYKERN_LORA ") -> Tensor y");
  m.def(
      "lora_linear_backward(Tensor? dy, Tensor input, Tensor weight, " PYKERN_LORA ", bool[6] output_mask)"
      " -> (Tensor dinput, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor ddora_scale)");
  m.def("lora_linear_4bit(Tensor input, " PYKERN_WEIGHT_4BIT ", " PYKERN_LORA ") -> Tensor y");
  m.def(
      "lora_linear_4bit_backward(Tensor? dy, Tensor input, " PYKERN_WEIGHT_4BIT ", " PYKERN_LORA
      ", bool[5] output_mask)"
      " -> (Tensor dinput, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor ddora_scale)");
  m.def("multi_lora_linear(Tensor input, Tensor weight, " PYKERN_MULTI_LORA ") -> Tensor y");
  m.def(
      "multi_lora_linear_backward(Tensor? dy, Tensor input, Tensor weight, " PYKERN_MULTI_LORA ", bool[6] output_mask)"
      " -> (Tensor dinput, Tensor dweight, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor dscaling)");
  m.def("multi_lora_linear_4bit(Tensor input, " PYKERN_WEIGHT_4BIT ", " PYKERN_MULTI_LORA ") -> Tensor y");
  m.def(
      "multi_lora_linear_4bit_backward(Tensor? dy, Tensor input, " PYKERN_WEIGHT_4BIT ", " PYKERN_MULTI_LORA
      ", bool[5] output_mask)"
      " -> (Tensor dinput, Tensor dlora_a, Tensor dlora_b, Tensor dbias, Tensor dscaling)");
  m.def("dora_norm(Tensor weight, Tensor lora_a, Tensor lora_b, float scaling) -> Tensor norm");
  m.def(
      "moe_route(Tensor logits, Tensor? selection_bias, Tensor? replay_ids, int top_k, str score, bool renormalize,"
      " int num_groups, int top_groups, str group_score, float scale) -> (Tensor weights, Tensor expert_ids)");
  m.def(
      "moe_route_backward(Tensor? dweights, Tensor logits, Tensor expert_ids, str score, bool renormalize, float scale,"
      " bool[1] output_mask) -> Tensor dlogits");
  m.def("moe_sort(Tensor expert_ids, int num_experts) -> (Tensor order, Tensor inverse, Tensor offs)");
  m.def("grouped_mm(" PYKERN_GROUPED_MM ") -> Tensor output");
  m.def(
      "grouped_mm_backward(Tensor? doutput, " PYKERN_GROUPED_MM ", bool[3] output_mask)"
      " -> (Tensor dmat_a, Tensor dmat_b, Tensor dbias)");
}
