# Read by llama-cpp-python's build (CMAKE_PROJECT_llama.cpp_INCLUDE, see the Makefile): leaves out the
# helper library of llama.cpp's command-line tools, half of the compile time, which Python never loads.
set(LLAMA_BUILD_COMMON OFF)
