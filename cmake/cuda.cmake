# The module _C_cuda, for whoever configures with IOSR_FAST_CUDA=ON. It needs nvcc and no GPU: what is built follows
# from the compiler and CMAKE_CUDA_ARCHITECTURES, by default every architecture below that the compiler knows.
include(CheckLanguage)
check_language(CUDA)
if(NOT CMAKE_CUDA_COMPILER)
  message(FATAL_ERROR "IOSR_FAST_CUDA=ON needs a CUDA compiler and none was found: put nvcc on PATH, or set CUDACXX")
endif()

if(NOT CMAKE_CUDA_ARCHITECTURES)
  set(IOSR_FAST_ARCHITECTURES "")
  execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-code OUTPUT_VARIABLE IOSR_FAST_NVCC_CODES ERROR_QUIET)
  # One of each generation, whose machine code runs on the others of it (8.6 and 8.9 run 8.0's).
  foreach(architecture 80 90 100 120)
    if(IOSR_FAST_NVCC_CODES MATCHES "sm_${architecture}[\r\n]")
      list(APPEND IOSR_FAST_ARCHITECTURES ${architecture})
    endif()
  endforeach()
  if(NOT IOSR_FAST_ARCHITECTURES)
    message(FATAL_ERROR "expected ${CMAKE_CUDA_COMPILER} --list-gpu-code to know one of sm_80, 90, 100, 120; "
      "it does not: name architectures by CMAKE_CUDA_ARCHITECTURES, or take CUDA 11.8 or newer")
  endif()
  # GPUs between these and after them compile PTX: the oldest's, or the newest's that they know.
  list(GET IOSR_FAST_ARCHITECTURES 0 IOSR_FAST_OLDEST)
  list(GET IOSR_FAST_ARCHITECTURES -1 IOSR_FAST_NEWEST)
  list(TRANSFORM IOSR_FAST_ARCHITECTURES APPEND "-real")
  set(CMAKE_CUDA_ARCHITECTURES ${IOSR_FAST_ARCHITECTURES} ${IOSR_FAST_OLDEST}-virtual ${IOSR_FAST_NEWEST}-virtual)
endif()
message(STATUS "CUDA architectures: ${CMAKE_CUDA_ARCHITECTURES}")

enable_language(CUDA)
set(CMAKE_CUDA_STANDARD 17)
set(CMAKE_CUDA_STANDARD_REQUIRED ON)
set(CMAKE_CUDA_EXTENSIONS OFF)

# The kernel is compiled apart from the bindings, so that nvcc never sees pybind11.
add_library(iosr_fast_cuda_kernels STATIC ${CMAKE_CURRENT_LIST_DIR}/../csrc/cuda/few_queries.cu)
set_target_properties(iosr_fast_cuda_kernels PROPERTIES
  POSITION_INDEPENDENT_CODE ON
  CUDA_RUNTIME_LIBRARY Static
  CUDA_VISIBILITY_PRESET hidden
  CXX_VISIBILITY_PRESET hidden)
target_compile_options(iosr_fast_cuda_kernels PRIVATE --threads=0)  # architectures in parallel

find_package(Python REQUIRED COMPONENTS Interpreter Development.Module)
find_package(pybind11 CONFIG REQUIRED)
pybind11_add_module(_C_cuda ${CMAKE_CURRENT_LIST_DIR}/../csrc/cuda/bindings.cpp)
set_target_properties(_C_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
target_compile_definitions(_C_cuda PRIVATE IOSR_FAST_VERSION="${IOSR_FAST_VERSION}")
target_link_libraries(_C_cuda PRIVATE iosr_fast_cuda_kernels)
if(CMAKE_CXX_COMPILER_ID MATCHES "GNU|Clang")
  target_compile_options(_C_cuda PRIVATE -Wall -Wextra -Wshadow)
endif()
