// The average of each window, exactly: terms are integers on a fine grid, summed in int32, then multiplied once.
//
//   y[p][c] = (float)(sum_k u[p][k][c]) * factor, as a float or rounded to a byte. See layers.h for u.

static ALWAYS_INLINE int32_t pool_term(const struct sum_pool* layer, const void* x, int32_t at) {
  float value;
  if (layer->input == POOL_INTEGERS) return ((const integer*)x)[at];
  if (layer->input == POOL_BYTES)
    value = rounded(layer->scale * (float)(((const uint8_t*)x)[at] - layer->zero));
  else
    value = ((const real*)x)[at];
  return nearest(rounded(value * layer->inverse), -layer->bound, layer->bound);
}

static SMALL void sum_pool(const struct sum_pool* layer, const void* x, void* y) {
  const struct window* window = &layer->window;
  int32_t at = 0;
  for (int oy = 0; oy < window->out_height; oy++) {
    for (int ox = 0; ox < window->out_width; ox++) {
      const int32_t iy = (int32_t)oy * window->stride_y - window->top,
                    ix = (int32_t)ox * window->stride_x - window->left;
      for (int c = 0; c < window->channels; c++, at++) {
        int32_t sum = 0;
        for (int ky = 0; ky < window->kernel_height; ky++) {
          const int32_t at_y = iy + ky * window->dilation_y;
          for (int kx = 0; kx < window->kernel_width && at_y >= 0 && at_y < window->height; kx++) {
            const int32_t at_x = ix + kx * window->dilation_x;
            if (at_x >= 0 && at_x < window->width)
              sum += pool_term(layer, x, (at_y * window->width + at_x) * window->channels + c);
          }
        }
        if (layer->form == FORM_FLOATS) {
          ((real*)y)[at] = (float)sum * layer->factor;
        } else {
          const int32_t zero = layer->zero_point, least = layer->least - zero, most = layer->most - zero;
          ((uint8_t*)y)[at] = (uint8_t)(zero + nearest(rounded((float)sum * layer->factor), least, most));
        }
      }
    }
  }
}
