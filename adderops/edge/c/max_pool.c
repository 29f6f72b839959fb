// The maximum of each window, on bytes: y[p][c] = max_k X[p][k][c]. Grids ascend, so it is the maximum of what they stand for.
//
// What is outside counts as 0, the least byte. Outputs are stored in ascending order, after their window has been read.

static SMALL void max_pool(const struct window* window, const uint8_t* x, uint8_t* y) {
  for (int oy = 0; oy < window->out_height; oy++) {
    for (int ox = 0; ox < window->out_width; ox++) {
      const int32_t iy = (int32_t)oy * window->stride_y - window->top,
                    ix = (int32_t)ox * window->stride_x - window->left;
      for (int c = 0; c < window->channels; c++) {
        uint8_t most = 0;
        for (int ky = 0; ky < window->kernel_height; ky++) {
          const int32_t at_y = iy + ky * window->dilation_y;
          for (int kx = 0; kx < window->kernel_width && at_y >= 0 && at_y < window->height; kx++) {
            const int32_t at_x = ix + kx * window->dilation_x;
            if (at_x >= 0 && at_x < window->width) {
              const uint8_t value = x[(at_y * window->width + at_x) * window->channels + c];
              if (value > most) most = value;
            }
          }
        }
        *y++ = most;
      }
    }
  }
}
