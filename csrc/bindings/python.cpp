#include "bindings/python.h"

#include <limits>
#include <map>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "bindings/operator.h"
#include "bindings/route.h"

namespace py = pybind11;

namespace qkernels::bindings {

namespace {

std::vector<at::Tensor> listed(at::TensorList tensors) { return {tensors.begin(), tensors.end()}; }

// Calls a kernel of Python, or of Triton.
class PythonRoute final : public Route {
 public:
  PythonRoute(py::object run, py::object run_quantized, py::object run_grouped)
      : run_(std::move(run)),
        run_quantized_(std::move(run_quantized)),
        run_grouped_(std::move(run_grouped)),
        takes_quantized_(!run_quantized_.is_none()),
        takes_groups_(!run_grouped_.is_none()) {}

  ~PythonRoute() override {
    const py::gil_scoped_acquire acquired;
    run_ = py::object();
    run_quantized_ = py::object();
    run_grouped_ = py::object();
  }

  at::Tensor run(const Call& call) const override {
    const py::gil_scoped_acquire acquired;
    const py::object y = call.row_scales == nullptr
                             ? run_(call.x, listed(call.list), call.bias)
                             : run_quantized_(call.x, *call.row_scales, listed(call.list),
                                              call.bias, py::cast(call.y_type));
    return y.cast<at::Tensor>();
  }

  at::Tensor run_grouped(const GroupedCall& call) const override {
    const py::gil_scoped_acquire acquired;
    return run_grouped_(call.x, call.ends, listed(call.list)).cast<at::Tensor>();
  }

  bool takes_quantized() const override { return takes_quantized_; }

  bool takes_groups(const Buffers&) const override { return takes_groups_; }

  bool reads_any_field() const override { return true; }

 private:
  py::object run_, run_quantized_, run_grouped_;
  bool takes_quantized_, takes_groups_;
};

// Never destroyed, since Python may be gone by then.
py::object& answer_of_python() {
  static auto* held = new py::object;
  return *held;
}

Answer ask_python(const Question& question) {
  const py::gil_scoped_acquire acquired;
  const py::object scale =
      question.row_scales == nullptr ? py::none() : py::cast(*question.row_scales);
  const auto [route, least, most] =
      answer_of_python()(question.x, scale, listed(question.buffers), std::string(question.spec),
                         py::cast(question.y_type))
          .cast<std::tuple<std::shared_ptr<Route>, int64_t, std::optional<int64_t>>>();
  return {route, least, most.value_or(std::numeric_limits<int64_t>::max())};
}

// A route that another library made: it gives away what this points to.
std::shared_ptr<Route> adopt(int64_t handle) {
  const std::unique_ptr<std::shared_ptr<Route>> held(
      reinterpret_cast<std::shared_ptr<Route>*>(handle));
  return *held;
}

at::Tensor run(const Route& route, const at::Tensor& x,
               const std::map<std::string, at::Tensor>& named, const Optional& bias,
               const Optional& row_scales, std::optional<at::ScalarType> y_type) {
  Buffers buffers;
  for (const auto& [name, tensor] : named) {
    const Field field = field_of(name);
    require(field != nullptr, "compiled kernels know no buffer called ", name);
    buffers.*field = &tensor;
  }
  require(x.dim() > 0, "x must have shape [..., K], got []");
  require(buffers.words != nullptr && buffers.scales != nullptr, "a weight has words and scales");
  require(!row_scales || route.takes_quantized(), "this weight takes no quantized x");
  const py::gil_scoped_release released;
  return route.run({x,
                    row_scales ? &*row_scales : nullptr,
                    buffers,
                    {},
                    bias,
                    y_type.value_or(x.scalar_type())});
}

}  // namespace

void register_routes(py::module_& m) {
  py::class_<Route, std::shared_ptr<Route>>(
      m, "Route", "How one kernel runs one weight: what is the same at every call.")
      .def("run", &run, py::arg("x"), py::arg("buffers"), py::arg("bias") = py::none(),
           py::arg("row_scales") = py::none(), py::arg("dtype") = py::none(),
           "y [..., N] for x [..., K] and the weight's buffers by name; row_scales fp32 [M] go "
           "with int8 x, dtype is that of y");
  py::class_<PythonRoute, Route, std::shared_ptr<PythonRoute>>(m, "PythonRoute")
      .def(py::init<py::object, py::object, py::object>(), py::arg("run"), py::arg("run_quantized"),
           py::arg("run_grouped") = py::none(),
           "run(x, buffers, bias); run_quantized(x, scale, buffers, bias, dtype) or None; "
           "run_grouped(x, ends, stacked buffers) or None");
  m.def("adopt_route", &adopt, py::arg("handle"), "the route that another library's operator made");
  m.def(
      "answer_with",
      [](py::object answer) {
        answer_of_python() = std::move(answer);
        answer_with(&ask_python);
      },
      py::arg("answer"),
      "sets what is asked where no route is known: (x, scale or None, buffers, spec, dtype of y) "
      "-> (Route, least rows, most rows or None)");
  m.def("forget_routes", &forget_routes, "asks anew for every route");
}

}  // namespace qkernels::bindings
