# Finds FlashInfer's headers and sets FLASHINFER_INCLUDE_DIRS: FLASHINFER_INCLUDE_DIR if given, else
# an installed flashinfer-python of the pinned version, else that wheel, downloaded with its hash
# checked and without its dependencies (no torch), of which include/ and spdlog/ are unpacked.
set(FLASHINFER_SHA256 bfdc18b9e1e4d8d0730fe4343dc0e284cd0c160086de80f99888bc4867922d49)

if(NOT FLASHINFER_INCLUDE_DIR)
  execute_process(
    COMMAND "${Python_EXECUTABLE}" -c
            "import importlib.metadata as m; d = m.distribution('flashinfer-python'); \
print(d.locate_file('flashinfer/data/include') if d.version == '${FLASHINFER_VERSION}' else '')"
    OUTPUT_VARIABLE FLASHINFER_INCLUDE_DIR OUTPUT_STRIP_TRAILING_WHITESPACE ERROR_QUIET)
endif()

if(NOT FLASHINFER_INCLUDE_DIR)
  set(flashinfer_dir "${CMAKE_BINARY_DIR}/flashinfer-${FLASHINFER_VERSION}")
  set(FLASHINFER_INCLUDE_DIR "${flashinfer_dir}/flashinfer/data/include")
  if(NOT EXISTS "${FLASHINFER_INCLUDE_DIR}/flashinfer")
    message(STATUS "Downloading the headers of flashinfer-python ${FLASHINFER_VERSION}")
    file(WRITE "${flashinfer_dir}/requirements.txt"
         "flashinfer-python==${FLASHINFER_VERSION} --hash=sha256:${FLASHINFER_SHA256}\n")
    execute_process(
      COMMAND "${Python_EXECUTABLE}" -m pip download --quiet --no-deps --require-hashes
              --only-binary=:all: --dest "${flashinfer_dir}"
              --requirement "${flashinfer_dir}/requirements.txt"
      COMMAND_ERROR_IS_FATAL ANY)
    file(GLOB wheel "${flashinfer_dir}/*.whl")
    file(ARCHIVE_EXTRACT INPUT "${wheel}" DESTINATION "${flashinfer_dir}"
         PATTERNS "flashinfer/data/include/*" "flashinfer/data/spdlog/*")
    file(REMOVE "${wheel}")
  endif()
endif()

if(NOT EXISTS "${FLASHINFER_INCLUDE_DIR}/flashinfer/comm/trtllm_allreduce_fusion.cuh")
  message(FATAL_ERROR "FLASHINFER_INCLUDE_DIR must hold flashinfer/comm/trtllm_allreduce_fusion.cuh, "
                      "got ${FLASHINFER_INCLUDE_DIR}; leave it unset to download the headers")
endif()
# spdlog lies beside include/ in the wheel, and beside it or inside it elsewhere.
set(FLASHINFER_INCLUDE_DIRS "${FLASHINFER_INCLUDE_DIR}"
                            "${FLASHINFER_INCLUDE_DIR}/../spdlog/include")
message(STATUS "FlashInfer headers: ${FLASHINFER_INCLUDE_DIR}")
