// Pictures to labels by a classifier that is one ONNX file, with Debian's libonnxruntime-dev, libjpeg-dev, libpng-dev:
// g++ -O2 -std=c++17 -I/usr/include/onnxruntime classify.cpp -o classify -lonnxruntime -ljpeg -lpng
// ./classify pets.onnx a.jpg b.png        prints a line of JSON for each
#include <onnxruntime_cxx_api.h>
#include <png.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>
#include <vector>

#include <jpeglib.h>  // needs FILE

struct Picture {
    int64_t width, height;
    std::vector<uint8_t> rgb;
};

// EXIF's orientation, 1 to 8; 1 without one.
int orientation_of(const uint8_t* exif, int64_t length) {
    const auto number = [&](int64_t at, int bytes) {
        uint32_t value = 0;
        for (int i = 0; i < bytes; ++i) value = value << 8 | exif[at + (exif[0] == 'M' ? i : bytes - 1 - i)];
        return int64_t(value);
    };
    if (length < 14) return 1;
    int64_t at = number(4, 4) + 2;
    const int64_t end = at > length ? 0 : at + 12 * number(at - 2, 2);
    for (; at + 12 <= std::min(end, length); at += 12)
        if (number(at, 2) == 0x0112) return std::clamp<int>(number(at + 8, 2), 1, 8);
    return 1;
}

Picture upright(const Picture& stored, int orientation) {
    const bool swapped = orientation >= 5, mirrored = std::strchr("\2\3\7\10", orientation);
    const bool upside_down = std::strchr("\3\4\6\7", orientation);
    Picture turned{stored.width, stored.height, std::vector<uint8_t>(stored.rgb.size())};
    if (swapped) std::swap(turned.width, turned.height);
    for (int64_t y = 0; y < turned.height; ++y)
        for (int64_t x = 0; x < turned.width; ++x) {
            int64_t column = swapped ? y : x, row = swapped ? x : y;
            if (mirrored) column = stored.width - 1 - column;
            if (upside_down) row = stored.height - 1 - row;
            std::copy_n(&stored.rgb[3 * (row * stored.width + column)], 3, &turned.rgb[3 * (y * turned.width + x)]);
        }
    return turned;
}

// A large one is decoded at a fraction of its size, with at least three times the model's left, as iosr_fast does.
Picture read_jpeg(FILE* file, int model_size) {
    jpeg_decompress_struct jpeg;
    jpeg_error_mgr errors;
    jpeg.err = jpeg_std_error(&errors);  // ends the program with a message
    jpeg_create_decompress(&jpeg);
    jpeg_save_markers(&jpeg, JPEG_APP0 + 1, 0xFFFF);
    jpeg_stdio_src(&jpeg, file);
    jpeg_read_header(&jpeg, TRUE);
    const int shorter = std::min(jpeg.image_width, jpeg.image_height);
    for (jpeg.scale_denom = 8; jpeg.scale_denom > 1 && shorter < 3 * int(jpeg.scale_denom) * model_size;)
        jpeg.scale_denom /= 2;
    const bool inks = jpeg.num_components == 4;
    jpeg.out_color_space = inks ? JCS_CMYK : JCS_RGB;
    jpeg_start_decompress(&jpeg);
    Picture picture{jpeg.output_width, jpeg.output_height, {}};
    std::vector<uint8_t> row(picture.width * jpeg.output_components);
    while (jpeg.output_scanline < jpeg.output_height) {
        uint8_t* start = row.data();
        jpeg_read_scanlines(&jpeg, &start, 1);
        if (!inks) picture.rgb.insert(picture.rgb.end(), row.begin(), row.end());
        for (size_t at = 0; inks && at < row.size(); at += 4)  // stored as light, 255 - ink
            for (int i = 0; i < 3; ++i) picture.rgb.push_back((row[at + i] * row[at + 3] + 127) / 255);
    }
    for (jpeg_saved_marker_ptr one = jpeg.marker_list; one; one = one->next)
        if (one->data_length > 6 && std::memcmp(one->data, "Exif\0", 6) == 0)
            picture = upright(picture, orientation_of(one->data + 6, one->data_length - 6));
    jpeg_destroy_decompress(&jpeg);
    return picture;
}

Picture read_png(FILE* file) {
    const auto fail = [](png_structp, png_const_charp words) { std::fprintf(stderr, "%s\n", words), std::exit(1); };
    png_structp png = png_create_read_struct(PNG_LIBPNG_VER_STRING, nullptr, fail, nullptr);
    png_infop info = png_create_info_struct(png);
    png_init_io(png, file);
    png_read_info(png, info);
    const bool colour = png_get_color_type(png, info) & PNG_COLOR_MASK_COLOR;
    png_set_expand(png);
    colour ? png_set_strip_16(png) : png_set_scale_16(png);
    png_set_gray_to_rgb(png);
    png_set_add_alpha(png, 255, PNG_FILLER_AFTER);
    png_set_interlace_handling(png);
    png_read_update_info(png, info);
    Picture picture{png_get_image_width(png, info), png_get_image_height(png, info), {}};
    std::vector<uint8_t> rgba(4 * picture.width * picture.height);
    std::vector<png_bytep> rows;
    for (int64_t y = 0; y < picture.height; ++y) rows.push_back(&rgba[4 * picture.width * y]);
    png_read_image(png, rows.data());
    png_bytep exif = nullptr;
    png_uint_32 length = 0;
    png_get_eXIf_1(png, info, &length, &exif);
    const int orientation = orientation_of(exif, length);
    png_destroy_read_struct(&png, &info, nullptr);
    for (size_t at = 0; at < rgba.size(); at += 4)  // on white
        for (int i = 0; i < 3; ++i) picture.rgb.push_back(255 - ((255 - rgba[at + i]) * rgba[at + 3] + 127) / 255);
    return upright(picture, orientation);
}

int main(int count, char** words) {
    if (count < 3) return std::fprintf(stderr, "expected MODEL.onnx PICTURE...\n"), 2;
    Ort::Env env;
    Ort::Session session(env, words[1], Ort::SessionOptions());
    Ort::AllocatorWithDefaultOptions allocator;
    const auto facts = session.GetModelMetadata().LookupCustomMetadataMapAllocated("iosr_fast", allocator);
    const int model_size = std::atoi(std::strstr(facts.get(), "\"image_size\":") + 13);
    bool promises = false;
    for (size_t i = 0; i < session.GetOutputCount(); ++i)
        promises |= std::strcmp(session.GetOutputNameAllocated(i, allocator).get(), "accepted") == 0;
    const char *inputs[] = {"picture"}, *outputs[] = {"probabilities", "label", "accepted"};
    const auto memory = Ort::MemoryInfo::CreateCpu(OrtArenaAllocator, OrtMemTypeDefault);
    for (int i = 2; i < count; ++i) {
        FILE* file = std::fopen(words[i], "rb");
        if (!file) return std::perror(words[i]), 1;
        const bool is_png = std::getc(file) == 0x89;
        std::rewind(file);
        Picture picture = is_png ? read_png(file) : read_jpeg(file, model_size);
        std::fclose(file);
        const int64_t shape[] = {1, picture.height, picture.width, 3};
        const auto start = std::chrono::steady_clock::now();
        auto input = Ort::Value::CreateTensor(memory, picture.rgb.data(), picture.rgb.size(), shape, 4);
        const auto answers = session.Run(Ort::RunOptions(), inputs, &input, 1, outputs, promises ? 3 : 2);
        const std::chrono::duration<double, std::milli> ms = std::chrono::steady_clock::now() - start;
        std::printf("{\"label\": %ld, ", *answers[1].GetTensorData<int64_t>());
        if (promises) std::printf("\"accepted\": %s, ", *answers[2].GetTensorData<bool>() ? "true" : "false");
        const float* probabilities = answers[0].GetTensorData<float>();
        const size_t classes = answers[0].GetTensorTypeAndShapeInfo().GetElementCount();
        for (size_t c = 0; c < classes; ++c) std::printf("%s%.9g", c ? ", " : "\"probabilities\": [", probabilities[c]);
        std::printf("], \"ms\": %.2f}\n", ms.count());
    }
}
