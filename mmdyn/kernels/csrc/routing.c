#include "routing.h"
#include <math.h>
#include <omp.h>
#include <string.h>

/* The valid cells of a region. */
typedef struct {
    int64_t top, left, bottom, right;
} Area;

int64_t count_regions(const Map *map) { return ceil_div(map->height, map->region) * ceil_div(map->width, map->region); }

static int64_t count_tokens(const Map *map) { return map->num_extra + map->height * map->width; }

static Area area_of(const Map *map, int64_t region) {
    int64_t columns = ceil_div(map->width, map->region);
    int64_t top = region / columns * map->region, left = region % columns * map->region;
    return (Area){top, left, min(top + map->region, map->height), min(left + map->region, map->width)};
}

MULTIVERSION void patch_mean(const float *cells, int64_t width, int64_t channels, int64_t rows, int64_t columns,
                             float *restrict out) {
    enum { PART = 32 }; /* channels whose sums stay in registers */
    float factor = 1.f / (float)(rows * columns);
    for (int64_t begin = 0; begin < channels; begin += PART) {
        int64_t count = min(PART, channels - begin);
        float sums[PART] = {};
        for (int64_t row = 0; row < rows; row++)
            for (int64_t column = 0; column < columns; column++) {
                const float *cell = cells + (row * width + column) * channels + begin;
                if (count == PART)
                    for (int c = 0; c < PART; c++) sums[c] += cell[c];
                else
                    for (int c = 0; c < count; c++) sums[c] += cell[c];
            }
        for (int64_t c = 0; c < count; c++) out[begin + c] = sums[c] * factor;
    }
}

MULTIVERSION static float dot(const float *a, const float *b, int64_t count) {
    float sum = 0;
#pragma omp simd reduction(+ : sum)
    for (int64_t c = 0; c < count; c++) sum += a[c] * b[c];
    return sum;
}

/* The first of the greatest. NaN counts as the greatest, as for torch. */
static int64_t argmax(const float *logits, int64_t count) {
    int64_t found = 0;
    for (int64_t k = 1; k < count; k++)
        if (!isnan(logits[found]) && !(logits[k] <= logits[found])) found = k;
    return found;
}

void choose(const Map *map, const float *tokens, const float *weight, const float *bias, int64_t options,
            float *logits) {
    int64_t regions = count_regions(map), n = map->channels, size = count_tokens(map);
#pragma omp parallel for if (is_parallel(map->images * size, n))
    for (int64_t i = 0; i < map->images * regions; i++) {
        const float *cells = tokens + (i / regions * size + map->num_extra) * n;
        float mean[n], own[options], *of_region = logits ? logits + i * options : own;
        Area area = area_of(map, i % regions);
        patch_mean(cells + (area.top * map->width + area.left) * n, map->width, n, area.bottom - area.top,
                   area.right - area.left, mean);
        for (int64_t k = 0; k < options; k++) of_region[k] = dot(mean, weight + k * n, n) + bias[k];
        if (!logits) map->choice[i] = argmax(of_region, options);
    }
}

void choose_by_scores(const Map *map, const float *scores, const float *bias, int64_t options, float *logits) {
    int64_t regions = count_regions(map), size = count_tokens(map);
#pragma omp parallel for if (is_parallel(map->images * size, options))
    for (int64_t i = 0; i < map->images * regions; i++) {
        float own[options], *of_region = logits ? logits + i * options : own;
        Area area = area_of(map, i % regions);
        float factor = 1.f / (float)((area.bottom - area.top) * (area.right - area.left));
        for (int64_t k = 0; k < options; k++) {
            const float *cells = scores + (k * map->images + i / regions) * size + map->num_extra;
            float sum = 0;
            for (int64_t row = area.top; row < area.bottom; row++)
                for (int64_t column = area.left; column < area.right; column++) sum += cells[row * map->width + column];
            of_region[k] = sum * factor + bias[k];
        }
        if (!logits) map->choice[i] = argmax(of_region, options);
    }
}

static int64_t count_patches(Area area, int64_t granularity) {
    return granularity ? ceil_div(area.bottom - area.top, granularity) * ceil_div(area.right - area.left, granularity)
                       : 0;
}

/* The key of a step of this slope: keys rise as slopes fall. NaN counts as the greatest, as for torch. */
static uint32_t key_of(float slope) {
    uint32_t bits;
    slope = isnan(slope) ? INFINITY : slope + 0.f; /* of the two zeros, the positive one */
    memcpy(&bits, &slope, sizeof(bits));
    return bits >> 31 ? bits : ~(bits | 1u << 31);
}

/* Sort by keys, byte after byte; those that are alike stay in their order. */
static void sort_steps(Step *steps, Step *other, int64_t count) {
    for (int shift = 0; shift < 32; shift += 8) {
        int64_t begins[257] = {0};
        for (int64_t i = 0; i < count; i++) begins[(steps[i].key >> shift & 255) + 1]++;
        for (int byte = 0; byte < 255; byte++) begins[byte + 1] += begins[byte];
        for (int64_t i = 0; i < count; i++) other[begins[steps[i].key >> shift & 255]++] = steps[i];
        Step *sorted = other;
        other = steps, steps = sorted;
    }
}

/* The corners of the upper hull of the points (cost, logit) of a region, from fewest to most queries; order and costs
 * are those of the options by their costs. Returns how many there are. */
static int64_t hull_of(const float *logits, const int64_t *order, const float *costs, int64_t options, int64_t *corners,
                       float *slopes) {
    int64_t count = 0;
    for (int64_t k = 0; k < options; k++) {
        float slope = 0;
        for (; count; count--) {
            int64_t last = corners[count - 1];
            slope = (logits[order[k]] - logits[order[last]]) / (costs[k] - costs[last]);
            if (count == 1 || slope < slopes[count - 1]) break;
        }
        slopes[count] = slope, corners[count++] = k;
    }
    return count;
}

void choose_within(const Map *map, const float *logits, const int64_t *granularities, int64_t options, int64_t budget,
                   Step *steps) {
    int64_t regions = count_regions(map), order[options], most = regions * options;
    float costs[options];
    for (int64_t k = 0, first = granularities[0] == 0; k < options; k++) { /* 0, then from coarse to fine */
        order[k] = k < first ? 0 : options - 1 - k + first;
        int64_t side = granularities[order[k]], patches = side ? map->region / side : 0;
        costs[k] = (float)(patches * patches);
    }
#pragma omp parallel for if (is_parallel(map->images * count_tokens(map), options))
    for (int64_t image = 0; image < map->images; image++) {
        Step *mine = steps + 2 * most * image;
        int64_t *choice = map->choice + image * regions, count = 0, spent = 0, corners[options];
        float slopes[options];
        for (int64_t i = 0; i < regions; i++) {
            int64_t num = hull_of(logits + (image * regions + i) * options, order, costs, options, corners, slopes);
            choice[i] = order[0], spent += count_patches(area_of(map, i), granularities[order[0]]);
            for (int64_t k = 1; k < num; k++)
                mine[count++] = (Step){key_of(slopes[k]), (int32_t)i, (int32_t)order[corners[k]]};
        }
        sort_steps(mine, mine + most, count);
        for (int64_t i = 0; i < count; i++) {
            Step step = mine[i];
            Area area = area_of(map, step.region);
            spent += count_patches(area, granularities[step.option]) -
                     count_patches(area, granularities[choice[step.region]]);
            if (spent > budget) break;
            choice[step.region] = step.option;
        }
    }
}

/* Each thread has a part of the regions, and begins to write where the parts before it end. */
void route(const Map *map, const int64_t *granularities, Patch *patches, int64_t *lengths) {
    int64_t regions = count_regions(map), size = count_tokens(map), counts[omp_get_max_threads()], total = 0;
#pragma omp parallel if (is_parallel(map->images * size, 0))
    {
        int64_t part = omp_get_thread_num(), parts = omp_get_num_threads();
        int64_t begin = map->images * regions * part / parts, end = map->images * regions * (part + 1) / parts;
        int64_t count = 0;
        for (int64_t i = begin; i < end; i++)
            count += count_patches(area_of(map, i % regions), granularities[map->choice[i]]) +
                     (i % regions ? 0 : map->num_extra);
        counts[part] = count;
#pragma omp atomic
        total += count;
#pragma omp barrier
        Patch *next = patches;
        for (int64_t i = 0; i < part; i++) next += counts[i];
        for (int64_t i = begin; i < end; i++) {
            int64_t image = i / regions, first = image * size + map->num_extra, side = granularities[map->choice[i]];
            if (i % regions == 0) {
                lengths[image] = next - patches;
                for (int64_t j = 0; j < map->num_extra; j++) *next++ = (Patch){image * size + j, 1, 1};
            }
            if (!side) continue;
            Area area = area_of(map, i % regions);
            for (int64_t top = area.top; top < area.bottom; top += side)
                for (int64_t left = area.left; left < area.right; left += side)
                    *next++ = (Patch){first + top * map->width + left, (int32_t)min(side, area.bottom - top),
                                      (int32_t)min(side, area.right - left)};
        }
    }
    for (int64_t image = 0; image < map->images; image++)
        lengths[image] = (image + 1 < map->images ? lengths[image + 1] : total) - lengths[image];
}
