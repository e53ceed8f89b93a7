"""Methods written out from their formulas, token by token, in plain Python: slow, and independent of the package.

Each takes (signals, k, method) as the tests have them, and gives the sorted kept tokens.
"""

import math
from fractions import Fraction
from operator import mul

EQUAL = 1e-9  # scores that are closer than this to the best, of 1, count as equal to it


def length(vector):
    return math.sqrt(math.fsum(x * x for x in vector))


def cosine(a, b):
    return cosines([a], [b])[0][0]


def cosines(a, b):
    """Of each vector of `a` with each of `b`. Rounded to multiples of 2^-32, as the methods have it: what is nearer
    counts as equal."""
    lengths = [length(vector) for vector in b]
    return [
        [
            round(math.fsum(map(mul, x, y)) / (of_x * of_y) * 2**32) / 2**32 if of_x * of_y else 0.0
            for y, of_y in zip(b, lengths, strict=True)
        ]
        for x, of_x in zip(a, map(length, a), strict=True)
    ]


def first_best(tokens, score, scale=1.0):
    """The token of the highest score, the lowest of equal ones."""
    scores = {i: score(i) for i in tokens}
    limit = max(scores.values()) - EQUAL * scale
    return min(i for i, value in scores.items() if value >= limit)


def ranked(scores):
    """Tokens, highest score first, lower ones first where equal."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def top_saliency(signals, k, method):
    return sorted(ranked(signals.saliency.tolist())[:k])


def signed_relevance(signals, method):
    sign = method.relevance_sign or signals.relevance_sign
    return [sign * value for value in signals.relevance.tolist()]


def top_relevance(signals, k, method):
    return sorted(ranked(signed_relevance(signals, method))[:k])


def top_importance(signals, k, method):
    return sorted(ranked(signals.importance.tolist())[:k])


# VisionZip


def visionzip_parts(signals, k, method):
    """Dominant and contextual tokens, and for each contextual one the tokens that join it."""
    contextual = math.floor(method.contextual_share * k + 0.5)
    dominant = ranked(signals.saliency.tolist())[: k - contextual]
    others = [i for i in range(signals.count) if i not in dominant]
    targets = []
    if contextual:
        step = max(1, len(others) // contextual)
        targets = [others[i] for i in range(0, len(others), step)][:contextual]
    vision_features = signals.vision_features.tolist()
    joined = {target: [] for target in targets}
    for i in others:
        if targets and i not in targets:
            joined[first_best(targets, lambda t, i=i: cosine(vision_features[i], vision_features[t]))].append(i)
    return dominant, joined


def visionzip(signals, k, method):
    dominant, joined = visionzip_parts(signals, k, method)
    return sorted([*dominant, *joined])


def visionzip_weights(signals, k, method):
    """{kept: {token: weight}}"""
    dominant, joined = visionzip_parts(signals, k, method)
    weights = {i: {i: 1.0} for i in dominant}
    for target, members in joined.items():
        if method.merge_by == "mean":
            weights[target] = dict.fromkeys([target, *members], 1 / (len(members) + 1))
        else:
            weights[target] = {target: 1.0} | {i: 1 / len(members) for i in members}
    return weights


# TRIM


def dot_products(signals, method):
    """With the question's unit vector: the cosine times the length of the patch."""
    lengths = [1.0] * signals.count if method.cosine else signals.patch_lengths.tolist()
    return [cosine * of_patch for cosine, of_patch in zip(signed_relevance(signals, method), lengths, strict=True)]


def trim(signals, k, method):
    return sorted(ranked(dot_products(signals, method))[:k])


def trim_weights(signals, k, method):
    """{kept: {token: weight}}"""
    order = ranked(dot_products(signals, method))
    weights = {i: {i: 1.0} for i in order[:k]}
    if method.mean_token and k > 1:
        others = order[k - 1 :]
        weights[order[k - 1]] = dict.fromkeys(others, 1 / len(others))
    return weights


# VisPruner


def vispruner(signals, k, method):
    vision_features = signals.vision_features.tolist()
    likeness = cosines(vision_features, vision_features)
    order = ranked(signals.saliency.tolist())
    important = math.floor(method.important_share * k)
    kept, rest = order[:important], order[important:]
    while len(rest) > k - important:
        if len(rest) == 1:
            rest = []
            break
        even = [token for place, token in enumerate(rest) if place % 2 == 0]
        odd = [token for place, token in enumerate(rest) if place % 2 == 1]
        closest = [max(likeness[i][j] for j in odd) for i in even]
        gone = min(method.step, len(rest) - (k - important), len(even))
        rest = [even[place] for place in ranked(closest)[gone:]] + odd
    return sorted(kept + rest)


# DivPrune


def divprune(signals, k, method):
    rows, tokens = signals.image_embeds.tolist(), range(signals.count)
    distance = [[1 - likeness for likeness in row] for row in cosines(rows, rows)]
    kept = [first_best(tokens, lambda i: min(distance[i][j] for j in tokens if j != i))]
    while len(kept) < k:
        kept.append(first_best(set(tokens) - set(kept), lambda i: min(distance[i][s] for s in kept)))
    return sorted(kept)


# Coverage: SCOPE and MMTok


def covering(likeness, weight, k):
    """`likeness[r][j]` of token j to each row r."""
    tokens = range(len(weight))
    columns = list(zip(*likeness, strict=True))

    def score(j, best):
        return weight[j] * math.fsum(value - low for value, low in zip(columns[j], best, strict=True) if value > low)

    scale = max(score(j, [0.0] * len(likeness)) for j in tokens)
    kept = []
    while len(kept) < k:
        best = [max([0.0, *(row[s] for s in kept)]) for row in likeness]
        kept.append(first_best(set(tokens) - set(kept), lambda j, best=best: score(j, best), scale))
    return sorted(kept)


def scope(signals, k, method):
    vision_features = signals.vision_features.tolist()
    return covering(cosines(vision_features, vision_features), [a**method.alpha for a in signals.saliency.tolist()], k)


def softmax(values, temperature):
    powers = [math.exp((value - max(values)) / temperature) for value in values]
    return [power / math.fsum(powers) for power in powers]


def mmtok(signals, k, method):
    question_embeds, rows, vision_features = (
        vectors.tolist() for vectors in (signals.question_embeds, signals.image_embeds, signals.vision_features)
    )
    covered = [
        [value / len(question_embeds) for value in softmax(row, method.text_temperature)]
        for row in cosines(question_embeds, rows)
    ]
    covered += [
        [method.alpha * value / len(vision_features) for value in softmax(row, method.vision_temperature)]
        for row in cosines(vision_features, vision_features)
    ]
    return covering(covered, [1.0] * len(rows), k)


# HoloV


def holov(signals, k, method):
    saliency = [Fraction(value) for value in signals.saliency.tolist()]
    crops, first = [], 0
    for view in signals.views:
        tokens = list(range(first, first + view.rows * view.cols))
        first += len(tokens)
        if method.crops == "runs":
            each, longer = divmod(len(tokens), 16)
            for p in range(16):
                size = each + (p < longer)
                crops.append(tokens[:size])
                tokens = tokens[size:]
        else:
            members = {}
            for place, token in enumerate(tokens):
                row, col = divmod(place, view.cols)
                crop = (row * min(4, view.rows) // view.rows, col * min(4, view.cols) // view.cols)
                members.setdefault(crop, []).append(token)
            crops += [members[crop] for crop in sorted(members)]
    crops = [crop for crop in crops if crop]
    weights = [sum(saliency[i] for i in crop) / len(crop) for crop in crops]
    budgets = [0] * len(crops)
    while left := k - sum(budgets):
        free = [p for p, crop in enumerate(crops) if budgets[p] < len(crop)]
        alike = all(weights[p] == 0 for p in free)
        weight = {p: Fraction(1) if alike else weights[p] for p in free}
        added = {p: math.floor(left * weight[p] / sum(weight.values())) for p in free}
        for p in sorted(free, key=lambda p: (-weight[p], p))[: left - sum(added.values())]:
            added[p] += 1
        for p in free:
            budgets[p] = min(budgets[p] + added[p], len(crops[p]))
    return sorted(
        i for crop, n in zip(crops, budgets, strict=True) for i in sorted(crop, key=lambda i: (-saliency[i], i))[:n]
    )


# HiRED


def hired(signals, k, method):
    saliency = signals.saliency.tolist()
    starts = [sum(view.rows * view.cols for view in signals.views[:n]) for n in range(len(signals.views))]
    bases = [n for n, view in enumerate(signals.views) if view.box == (0.0, 0.0, 1.0, 1.0)]
    if len(signals.views) == 1 or not bases:
        return top_saliency(signals, k, method)
    base = signals.views[bases[0]]
    base_tokens = list(range(starts[bases[0]], starts[bases[0]] + base.rows * base.cols))
    tiles = []  # (tokens, left, top, right, bottom)
    for n, view in enumerate(signals.views):
        if n == bases[0]:
            continue
        x0, y0, x1, y1 = view.box
        down, across = math.ceil(view.rows / base.rows), math.ceil(view.cols / base.cols)
        for i in range(down):
            for j in range(across):
                r0, r1 = i * view.rows // down, (i + 1) * view.rows // down
                c0, c1 = j * view.cols // across, (j + 1) * view.cols // across
                tokens = [starts[n] + r * view.cols + c for r in range(r0, r1) for c in range(c0, c1)]
                width, height = (x1 - x0) / view.cols, (y1 - y0) / view.rows
                tiles.append((tokens, x0 + c0 * width, y0 + r0 * height, x0 + c1 * width, y0 + r1 * height))
    leading = sorted(base_tokens, key=lambda i: (-saliency[i], i))[: int((1 - method.base_share) * len(base_tokens))]
    counts = []
    for _, left, top, right, bottom in tiles:
        centres = [divmod(i - base_tokens[0], base.cols) for i in leading]
        counts.append(
            sum(
                left <= (c + 0.5) / base.cols + 1e-9 < right and top <= (r + 0.5) / base.rows + 1e-9 < bottom
                for r, c in centres
            )
        )
    room = sum(len(tile[0]) for tile in tiles)
    quota = max(min(math.floor(method.base_share * k), len(base_tokens)), k - room)
    budgets = shared(counts, [len(tile[0]) for tile in tiles], k - quota)
    kept = sorted(base_tokens, key=lambda i: (-saliency[i], i))[:quota]
    for (tokens, *_), budget in zip(tiles, budgets, strict=True):
        kept += sorted(tokens, key=lambda i: (-saliency[i], i))[:budget]
    return sorted(kept)


def shared(weights, caps, k):
    """k over parts by weight, none above its cap: what a full part can't take goes to the others by their weights, and
    to parts without weight, alike, where those with weight are full; largest remainders."""
    held = sum(cap for weight, cap in zip(weights, caps, strict=True) if weight)
    if k > held:
        rest = shared(
            [1] * len(caps), [0 if weight else cap for weight, cap in zip(weights, caps, strict=True)], k - held
        )
        return [cap if weight else more for weight, cap, more in zip(weights, caps, rest, strict=True)]
    shares = {p: Fraction(0) for p in range(len(caps))}
    free, left = {p for p in shares if weights[p] and caps[p]}, Fraction(k)
    while free:
        total = sum(weights[p] for p in free)
        full = {p for p in free if left * weights[p] / total >= caps[p]}
        if not full:
            shares |= {p: left * weights[p] / total for p in free}
            break
        shares |= {p: Fraction(caps[p]) for p in full}
        left -= sum(caps[p] for p in full)
        free -= full
    budgets = [math.floor(share) for share in shares.values()]
    for p in sorted(shares, key=lambda p: (budgets[p] - shares[p], p))[: k - sum(budgets)]:
        budgets[p] += 1
    return budgets


# HiPrune, HIVTP and FoPru


def places_of(views):
    """View, row and column of each token."""
    return [(v, row, col) for v, view in enumerate(views) for row in range(view.rows) for col in range(view.cols)]


def hiprune(signals, k, method):
    middle, received = signals.middle_attention.tolist(), signals.received_attention.tolist()
    places = places_of(signals.views)
    anchors = ranked(middle)[: min(k, math.floor(method.alpha * k / 5 + 0.5))]
    steps = ((0, 1), (0, -1), (1, 0), (-1, 0))
    beside = {(places[i][0], places[i][1] + down, places[i][2] + across) for i in anchors for down, across in steps}
    buffers = [i for i in ranked(middle) if places[i] in beside and i not in anchors]
    kept = (anchors + buffers)[:k]
    return sorted(kept + [i for i in ranked(received) if i not in kept][: k - len(kept)])


def hivtp(signals, k, method):
    importance, places = signals.middle_attention.tolist(), places_of(signals.views)

    def blocks(sides_of):
        """Tokens by the block of their view that they lie in, views and blocks in turn; `sides_of` a view's blocks."""
        members = {}
        for i, (v, row, col) in enumerate(places):
            view, (down, across) = signals.views[v], sides_of(signals.views[v])
            place = [
                next(n for n in range(count) if x < (n + 1) * length // count)
                for x, length, count in ((row, view.rows, down), (col, view.cols, across))
            ]
            members.setdefault((v, *place), []).append(i)
        return [members[block] for block in sorted(members)]

    def up(length, side):
        return -(-length // side)

    regions = blocks(lambda view: [min(length, method.regions) for length in (view.rows, view.cols)])
    budgets = shared(
        [1] * len(regions), [len(region) for region in regions], max(1, math.floor(method.global_share * k))
    )
    kept = []
    for region, n in zip(regions, budgets, strict=True):
        kept += sorted(region, key=lambda i: (-importance[i], i))[:n]
    windows = blocks(lambda view: [up(length, method.window) for length in (view.rows, view.cols)])
    while len(kept) < k:
        free = [[i for i in window if i not in kept] for window in windows]
        best = [min(window, key=lambda i: (-importance[i], i)) for window in free if window]
        kept += sorted(best, key=lambda i: (-importance[i], i))[: k - len(kept)]
    return sorted(kept)


def fopru(signals, k, method):
    received = signals.received_attention.tolist()
    if method.strategy == "rank":
        return sorted(ranked(received)[:k])
    rows = {}
    for i, (v, row, _) in enumerate(places_of(signals.views)):
        rows.setdefault((v, row), []).append(i)
    rows = list(rows.values())
    means = [round(math.fsum(received[i] for i in row) / len(row) * 2**32) for row in rows]
    kept = []
    for n in ranked(means):
        kept += sorted(rows[n], key=lambda i: (-received[i], i))
    return sorted(kept[:k])


# VFlowOpt


def vflowopt_parts(signals, k, method):
    """Importance, the important tokens, and for each recycled one the tokens that are merged into it."""

    def scaled(signal):
        low, high = min(signal), max(signal)
        return [(x - low) / (high - low) if high > low else 0.0 for x in signal]

    pairs = zip(scaled(signals.received_attention.tolist()), scaled(signals.entropy.tolist()), strict=True)
    importance = [(1 - method.beta) * a + method.beta * e for a, e in pairs]
    important = ranked(importance)[: k - math.floor(method.recycled_share * k + 0.5)]
    cells = {}
    for i, (v, row, col) in enumerate(places_of(signals.views)):
        view = signals.views[v]
        down, across = (-(-length // method.cell) for length in (view.rows, view.cols))
        cell = (v, ((row + 1) * down - 1) // view.rows, ((col + 1) * across - 1) // view.cols)
        cells.setdefault(cell, [])
        if i not in important:
            cells[cell].append(i)
    members = [cells[cell] for cell in sorted(cells)]
    sizes = [len(cell) for cell in members]
    joined = {}
    for cell, quota in zip(members, shared(sizes, sizes, k - len(important)), strict=True):
        chosen = sorted(sorted(cell, key=lambda i: (-importance[i], i))[:quota])
        joined |= {i: [] for i in chosen}
        for n, i in enumerate(i for i in cell if i not in chosen):
            if chosen:
                joined[chosen[n % len(chosen)]].append(i)
    return importance, important, joined


def vflowopt(signals, k, method):
    _, important, joined = vflowopt_parts(signals, k, method)
    return sorted([*important, *joined])


def vflowopt_weights(signals, k, method):
    """{kept: {token: weight}}"""
    importance, important, joined = vflowopt_parts(signals, k, method)
    weights = {i: {i: 1.0} for i in important}
    for i, others in joined.items():
        total = math.fsum(importance[j] + 1e-6 for j in [i, *others])
        weights[i] = {j: (importance[j] + 1e-6) / total for j in [i, *others]}
    return weights


# RATE


def rate(signals, k, method):
    return pivots(signals.vision_features.double().tolist(), k)


def take_out(vectors, token):
    """Takes what lies along one of the vectors out of all of them."""
    length = math.sqrt(math.fsum(x * x for x in vectors[token]))
    axis = [x / length for x in vectors[token]]
    for vector in vectors:
        along = math.fsum(x * y for x, y in zip(vector, axis, strict=True))
        vector[:] = [x - along * y for x, y in zip(vector, axis, strict=True)]


def pivots(vectors, k):
    """Again and again the vector of which most lies outside of the span of those taken; then the longest."""
    squares = [math.fsum(x * x for x in vector) for vector in vectors]
    outside, kept = [list(vector) for vector in vectors], []
    while len(kept) < k:
        free = set(range(len(vectors))) - set(kept)
        left = {i: math.fsum(x * x for x in outside[i]) for i in free}
        score = {i: square for i, square in left.items() if square > 1e-9 * squares[i]}
        if not score:
            return sorted(kept + [i for i in ranked(squares) if i in free][: k - len(kept)])
        token = first_best(score, score.get, max(score.values()))
        take_out(outside, token)
        kept.append(token)
    return sorted(kept)


# CDPruner


def cdpruner(signals, k, method):
    """The determinant grows by the squared part of a row that those taken don't span, times the squared quality."""
    relevance = signed_relevance(signals, method)
    low, high = min(relevance), max(relevance)
    quality = [(r - low + 1e-6) / (high - low) if high > low else 1.0 for r in relevance]
    outside = []
    for row in signals.image_embeds.tolist():
        length = math.sqrt(math.fsum(x * x for x in row))
        outside.append([x / length if length else 0.0 for x in row])
    kept = []
    while len(kept) < k:
        free = set(range(len(outside))) - set(kept)
        squares = {i: math.fsum(x * x for x in outside[i]) for i in free}
        score = {i: quality[i] ** 2 * squares[i] for i in free if squares[i] > 1e-8}
        if not score:
            order = [i for i in ranked(relevance) if i in free]
            return sorted(kept + order[: k - len(kept)])
        token = first_best(score, score.get, max(score.values()))
        take_out(outside, token)
        kept.append(token)
    return sorted(kept)


# Rules inside the language model: each takes (layer_signals, k, rule), and gives the sorted kept places among the n


def duplication(layer_signals, k, rule):
    """DART: pivots by the sums of their keys, then for each in turn what is least like it."""
    sums, text_sums = (
        [math.fsum(map(abs, key)) for key in keys.tolist()] for keys in (layer_signals.keys, layer_signals.text_keys)
    )
    hidden_states, text_hidden_states = layer_signals.hidden_states.tolist(), layer_signals.text_hidden_states.tolist()
    kept = ranked(sums)[: min(rule.visual_pivots, k)]
    pivots = [hidden_states[i] for i in kept] + [text_hidden_states[t] for t in ranked(text_sums)[: rule.text_pivots]]
    left = k - len(kept)
    quotas = [left // len(pivots) + (place < left % len(pivots)) for place in range(len(pivots))] if pivots else []
    for pivot, quota in zip(pivots, quotas, strict=True):
        for _ in range(quota):
            free = [i for i in range(len(hidden_states)) if i not in kept]
            kept.append(first_best(free, lambda i, pivot=pivot: -cosine(pivot, hidden_states[i])))
    return sorted(kept)


def suppression(layer_signals, k, rule):
    """AdaptPrune: soft non-maximum suppression."""
    place = {}
    for number, view in enumerate(layer_signals.views):
        place |= {len(place) + i: (number, *divmod(i, view.cols)) for i in range(view.rows * view.cols)}
    keys, scores = layer_signals.keys.tolist(), []
    for token, attention in zip(layer_signals.tokens.tolist(), layer_signals.attention.tolist(), strict=True):
        number, *at = place[token]
        sides = (layer_signals.views[number].rows, layer_signals.views[number].cols)
        off = sum((2 * x / (side - 1) - 1) ** 2 if side > 1 else 0.0 for x, side in zip(at, sides, strict=True))
        scores.append(attention * math.exp(-off / (2 * rule.centre**2)))
    kept = []
    while len(kept) < k:
        free = [i for i in range(len(scores)) if i not in kept]
        best = first_best(free, scores.__getitem__, max(scores[i] for i in free))
        kept.append(best)
        view, *at = place[int(layer_signals.tokens[best])]
        for i in free:
            other, *there = place[int(layer_signals.tokens[i])]
            distance = math.dist(at, there)
            if other == view and distance <= rule.radius + EQUAL:
                near = math.exp(-(distance**2) / (2 * rule.sigma**2))
                scores[i] *= 1 - near * math.exp(-((1 - cosine(keys[i], keys[best])) ** 2) / (2 * rule.likeness**2))
    return sorted(kept)


def pyramid(layer_signals, k, rule):
    """PTP: a budget per view by its mean saliency, and in it what is salient and what the text attends to."""
    view_of = [v for v, _, _ in places_of(layer_signals.views)]
    views = [view_of[token] for token in layer_signals.tokens.tolist()]
    saliency, attention = layer_signals.saliency.tolist(), layer_signals.attention.tolist()

    def scaled(signal):
        low, high = min(signal), max(signal)
        return [(x - low) / (high - low) if high > low else 0.0 for x in signal]

    members = [[i for i, v in enumerate(views) if v == number] for number in sorted(set(views))]
    weights = [Fraction(math.fsum(saliency[i] for i in of_view)) / len(of_view) for of_view in members]
    budgets = shared(weights, [len(of_view) for of_view in members], k)
    if not views:
        return []
    pairs = zip(scaled(saliency), scaled(attention), strict=True)
    score = [(1 - rule.alpha) * a + rule.alpha * c for a, c in pairs]
    kept = []
    for of_view, budget in zip(members, budgets, strict=True):
        kept += sorted(of_view, key=lambda i: (-score[i], i))[:budget]
    return sorted(kept)


def coordinates(layer_signals, k, rule):
    """IVC-Prune: positions of the highest mean cosine and sine, then seeds by the text's values, and what is alike."""
    values, text = layer_signals.values.double().tolist(), layer_signals.text_values.double().tolist()

    def attention(queries):
        each = [
            softmax([math.fsum(x * y for x, y in zip(q, v, strict=True)) / math.sqrt(len(v)) for v in values], 1.0)
            for q in queries
        ]
        return [round(math.fsum(row[i] for row in each) / len(each) * 2**32) for i in range(len(values))]

    count, kept = math.floor(rule.coordinate_share * k + 0.5), []
    for column, quota in enumerate(((count + 1) // 2, count // 2)):
        angles = layer_signals.rotary[:, column].tolist()
        kept += [i for i in ranked(angles) if i not in kept][:quota]
    left = k - count
    if left:
        likeness = attention(text or values)
        seeds = [i for i in ranked(likeness) if i not in kept]
        seeds = seeds[: min(left, max(1, math.floor(rule.seed_share * len(values) + 0.5)))]
        likeness = attention([values[i] for i in seeds])
        kept += seeds + [i for i in ranked(likeness) if i not in kept + seeds][: left - len(seeds)]
    return sorted(kept)


def balanced(layer_signals, k, rule):
    """BTP: some by attention, those in the first half before others; the rest far from all that stays."""
    attention, tokens = layer_signals.attention.tolist(), layer_signals.tokens.tolist()
    places = [places_of(layer_signals.views)[token] for token in tokens]
    count = math.floor(rule.attention_share * k + 0.5)
    candidates = ranked(attention)[: 2 * count]
    kept = sorted(candidates, key=lambda i: (i >= len(tokens) // 2, -attention[i], i))[:count]

    def distance(i, j):
        (a, *there), (b, *here) = places[i], places[j]
        return math.inf if a != b else sum(abs(x - y) for x, y in zip(there, here, strict=True))

    while len(kept) < k:
        free = [i for i in range(len(tokens)) if i not in kept]
        gap = {i: min((distance(i, j) for j in kept), default=math.inf) for i in free}
        kept.append(min(free, key=lambda i: (-gap[i], -attention[i], i)))
    return sorted(kept)


def raters(visual, text):
    """SparseVLM: which of the text's tokens the visual ones are more like than like the others, on average."""
    visual, text = visual.tolist(), text.tolist()
    each = [softmax([math.fsum(x * y for x, y in zip(v, t, strict=True)) for t in text], 1.0) for v in visual]
    means = [math.fsum(row[t] for row in each) / len(each) for t in range(len(text))]
    above = [mean > 1 / len(text) + 1e-9 for mean in means]
    return above if any(above) else [True] * len(text)
