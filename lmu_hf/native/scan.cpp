// The operators of this package for CPUs: what takes too many small steps for calls from Python.
//
// Rows of a batch never meet inside a chunk, so each thread takes some rows through all of its steps without waiting for the
// others. The products are too thin for a BLAS call each: they are done here.
//
// Names and formulas are those of lookahead.py and gates.py. Matrices come in panels, see Panels.

#include <torch/library.h>

#include "allocator.h"
#include "convolution.h"
#include "feedback.h"
#include "folded.h"
#include "matrices.h"
#include "memory.h"
#include "merged.h"
#include "recurrent.h"
#include "relaxed.h"
#include "steps.h"
#include "stream_function.h"

TORCH_LIBRARY(lmu_hf, library) {
  library.class_<Stream>("Stream")
      .def(torch::init<
           std::string, std::vector<at::Tensor>, at::Tensor, bool, bool, std::string, std::optional<at::Tensor>, at::Tensor,
           at::Tensor, std::vector<int64_t>, at::Tensor, at::Tensor, std::optional<at::Tensor>, int64_t,
           int64_t>())
      .def("step", &Stream::step)
      .def("function", &function_of);
  library.def(
      "scan_forward(str kind, int linear, int first, int count, int chunk, Tensor known, Tensor matrix, Tensor[] states, "
      "Tensor(a!)[] kept, Tensor(b!) u, Tensor[] encoding, Tensor? mask, str activation) -> ()");
  library.def(
      "scan_backward(str kind, int linear, int first, int count, int chunk, Tensor to_hidden, Tensor to_u, Tensor[] states, "
      "Tensor[] kept, Tensor[] grads, Tensor grad_u, Tensor(a!) grad_sums, Tensor(b!) carry, Tensor(c!) carried, "
      "Tensor[] encoding, Tensor? mask, str activation) -> ()");
  // All steps of a loop without memory that reads its inputs (B, T, I): [h, inputs, 1] -> sums by a matrix as it is, with or
  // without the last row; or, if the matrix has rows for h only, to whose sums they are added (B, T, W). With memory in front of
  // h, `alone` takes h once more. And its adjoint.
  library.def(
      "recurrent_forward(str kind, int linear, Tensor given, Tensor matrix, Tensor[] states, Tensor(a!)[] kept, "
      "Tensor(b!)? alone) -> ()");
  library.def(
      "recurrent_backward(str kind, int linear, Tensor given, Tensor matrix, Tensor[] states, Tensor[] kept, Tensor[] grads, "
      "Tensor(a!) carry, Tensor(b!) carried, Tensor(c!)? grad_given, Tensor(d!)? grad_matrix) -> ()");
  // The matrix of such a loop, of the parts of a small LMU (merged.py), and the gradients of these.
  library.def(
      "merged_operator(int[] layout, Tensor A, Tensor B, Tensor kernel, Tensor? recurrent, Tensor? u_bias, Tensor weight, "
      "Tensor? hidden, Tensor? bias) -> Tensor");
  library.def(
      "merged_operator_backward(int[] layout, Tensor grad, Tensor A, Tensor B, Tensor kernel, Tensor? recurrent, "
      "Tensor? u_bias, Tensor weight, Tensor? hidden, Tensor? bias) -> Tensor?[]");
  // The chunks of a segment whose u is known: known (B, L, W), starts and to_starts (B, L / C, D * N), folds (C, D * N, W) in
  // panels, or (C, W, D * N) for the adjoint. Of the L steps, `count` are there.
  library.def(
      "folded_forward(str kind, int first, int count, int chunk, Tensor known, Tensor folds, Tensor starts, Tensor matrix, "
      "Tensor[] states, Tensor(a!)[] kept) -> ()");
  library.def(
      "folded_backward(str kind, int first, int count, int chunk, Tensor folds, Tensor to_hidden, Tensor[] states, "
      "Tensor[] kept, Tensor[] grads, Tensor(a!) grad_sums, Tensor(b!) to_starts, Tensor(c!) carry, Tensor(d!) carried) -> ()");
  // The chunks of a segment, L steps from `first` on: fold (D * N, C * W), starts (B, K, D * N), memory (B, D, N), which is
  // updated, and known (B, L, W); powers, A^C transposed (S, N, N), and responses (S, C, N) in panels. With `folds`, the fold as
  // (C, D * N, W) in panels, each thread takes its rows through all chunks; without, the product with it is for all threads.
  // With `given` (B, T, I), of all steps, they read their inputs by a weight in panels and a bias, and `known` has no features.
  library.def(
      "feedback_forward(str kind, int first, Tensor(d!) known, Tensor fold, Tensor? folds, Tensor power, Tensor response, "
      "Tensor matrix, Tensor[] states, Tensor(a!)[] kept, Tensor(b!) u, Tensor(c!) starts, Tensor(e!) memory, "
      "Tensor[] encoding, Tensor? mask, str activation, Tensor? given, Tensor? weight, Tensor? bias) -> ()");
  // Its adjoint, with power A^C and response (S, N, C) in panels, and folds (C, W, D * N). `arrived` (B, K + 1, D * N) takes the
  // gradients of the memory at the start of each of these K chunks; in its last place comes that of the memory after them. With
  // `given`, grad_matrix is added to, with rows [u before, h, inputs, 1, if there is a bias].
  library.def(
      "feedback_backward(str kind, int first, Tensor fold, Tensor? folds, Tensor power, Tensor response, Tensor to_hidden, "
      "Tensor to_u, Tensor[] states, Tensor[] kept, Tensor[] grads, Tensor(a!) grad_u, Tensor(b!) grad_sums, Tensor(c!) carry, "
      "Tensor(d!) carried, Tensor? grad_starts, Tensor(e!) arrived, Tensor[] encoding, Tensor? mask, str activation, "
      "Tensor? given, Tensor? to_given, Tensor? u, Tensor(f!)? grad_given, Tensor(g!)? grad_matrix) -> ()");
  // A kernel (D, T, W) as its spectrum, in an order of its own, for transforms of `size` points, with its first lag at point
  // `offset`; u (B, T, D) convolved with it, which is added to out (B, T, W); and the adjoint, which adds to both gradients.
  library.def("convolution_spectrum(Tensor kernel, int size, int offset) -> Tensor");
  library.def("convolution_forward(Tensor u, Tensor spectrum, Tensor(a!) out) -> ()");
  library.def(
      "convolution_backward(Tensor u, Tensor spectrum, Tensor grad, Tensor(a!)? grad_u, Tensor(b!)? grad_kernel) -> ()");
  // All steps of a coupled layer whose memory begins empty: given (B, T, I) with its weight and bias, u (B, T, D), and the spectra
  // of the kernel (D, T - 1, W), from lag 1 on, for transforms of 2 C, 4 C, .. points. The adjoint adds to grad_u, which begins with
  // what comes from elsewhere, to grad_matrix, as that of a segment does, and to grad_kernel. With grad_sums (R, T, W), it takes R
  // rows from `first_row` on, and leaves the gradients of their sums there.
  library.def(
      "relaxed_forward(str kind, int chunk, Tensor given, Tensor weight, Tensor? bias, Tensor matrix, int width, "
      "Tensor[] spectra, Tensor[] states, Tensor(a!)[] kept, Tensor(b!) u) -> ()");
  library.def(
      "relaxed_backward(str kind, int chunk, Tensor given, Tensor? to_given, Tensor to_hidden, Tensor to_u, int width, "
      "Tensor[] spectra, Tensor[] states, Tensor[] kept, Tensor[] grads, Tensor u, Tensor(a!) grad_u, Tensor(b!) carry, "
      "Tensor(c!) carried, Tensor(d!)? grad_given, Tensor(e!)? grad_matrix, Tensor(f!)? grad_kernel, int first_row, "
      "Tensor(g!)? grad_sums) -> ()");
  // A tensor on the CPU, not initialised, whose memory is kept for the next one; and what gives all that is kept to the system.
  library.def("empty(int[] shape, ScalarType dtype) -> Tensor", &empty_of);
  library.def("release_memory() -> ()", &release_memory);
  // A matrix (.., K, W) cut into panels of columns: (.., P, K, 16).
  library.def("panels(Tensor matrix) -> Tensor");
  // total (M, N), of contiguous rows or columns, = a (M, K) @ b (K, N), added to what is there if it is kept; whether that is faster
  // than BLAS is.
  library.def("add_product(Tensor(a!) total, Tensor a, Tensor b, bool kept) -> ()");
  library.def("outdoes_blas() -> bool", &outdoes_blas);
  // starts (M, D, N), u (M, C, D), A (S, N, N), B (S, N), states (M, C, D, N); N up to 32. `arriving` takes the gradients that
  // reach each state, later ones included.
  library.def("memory_forward(Tensor starts, Tensor u, Tensor A, Tensor B, Tensor(a!) states) -> ()");
  library.def(
      "memory_backward(Tensor grads, Tensor A, Tensor B, Tensor(a!) grad_starts, Tensor(b!) grad_u, Tensor(c!)? arriving) -> ()");
}

TORCH_LIBRARY_IMPL(lmu_hf, CPU, library) {
  library.impl("scan_forward", &forward);
  library.impl("scan_backward", &backward);
  library.impl("recurrent_forward", &recurrent_forward);
  library.impl("recurrent_backward", &recurrent_backward);
  library.impl("merged_operator", &merged_operator);
  library.impl("merged_operator_backward", &merged_operator_backward);
  library.impl("folded_forward", &folded_forward);
  library.impl("folded_backward", &folded_backward);
  library.impl("feedback_forward", &feedback_forward);
  library.impl("feedback_backward", &feedback_backward);
  library.impl("convolution_spectrum", &convolution_spectrum);
  library.impl("convolution_forward", &convolution_forward);
  library.impl("convolution_backward", &convolution_backward);
  library.impl("relaxed_forward", &relaxed_forward);
  library.impl("relaxed_backward", &relaxed_backward);
  library.impl("panels", &panels_of);
  library.impl("add_product", &add_product_either_way);
  library.impl("memory_forward", &memory_forward);
  library.impl("memory_backward", &memory_backward);
}
