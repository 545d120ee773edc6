package edgeq.model

import android.graphics.Bitmap

/**
 * A picture as the input of the model, in the way in which the model was quantized.
 *
 * Pixels of 0 to 255 are multiplied by @SCALE@; the mean is subtracted, and the result is divided by
 * the standard deviation of each channel. It is computed on the processor: call it off the main thread.
 */
fun GraphModel.Companion.input(picture: Bitmap): FloatArray {
    // a copy, as pixels of a bitmap of the graphics processor cannot be read
    val readable = picture.copy(Bitmap.Config.ARGB_8888, false)
    val pixels = IntArray(readable.width * readable.height)
    readable.getPixels(pixels, 0, readable.width, 0, 0, readable.width, readable.height)
    return Picture(pixels, readable.width, readable.height).input()
}

/** Pixels with a byte each of alpha, red, green and blue, row by row. */
internal class Picture(private val pixels: IntArray, private val w: Int, private val h: Int) {
    private val width = @WIDTH@
    private val height = @HEIGHT@
    private val resize = "@RESIZE@"
    private val mean = floatArrayOf(@MEAN@)
    private val deviation = floatArrayOf(@STD@)

    /** The numbers that the model takes: the picture is fitted the way "@RESIZE@". */
    fun input(): FloatArray {
        val size = sizeWithin()
        val box = boxUsed()
        val fitted = resized(box, size[0], size[1])
        val left = Math.rint((width - size[0]) / 2.0).toInt()
        val top = Math.rint((height - size[1]) / 2.0).toInt()
        val values = FloatArray(3 * width * height)
        for (y in 0 until height) {
            for (x in 0 until width) {
                val inside = x - left in 0 until size[0] && y - top in 0 until size[1]
                val from = 3 * ((y - top) * size[0] + x - left)
                val pixel = y * width + x
                for (channel in 0 until 3) {
                    val value = (if (inside) fitted[from + channel] else 0) * @SCALE@f
                    values[@PLACE@] = (value - mean[channel]) / deviation[channel]
                }
            }
        }
        return values
    }

    /** Width and height of the picture within the input; with "pad" black is around it. */
    private fun sizeWithin(): IntArray {
        if (resize != "pad") return intArrayOf(width, height)
        val across = w.toDouble() / h
        val wanted = width.toDouble() / height
        return when {
            across > wanted -> intArrayOf(width, Math.rint(h.toDouble() / w * width).toInt())
            across < wanted -> intArrayOf(Math.rint(across * height).toInt(), height)
            else -> intArrayOf(width, height)
        }
    }

    /** Left, top, right and bottom of what is used of the picture: with "crop" its middle. */
    private fun boxUsed(): DoubleArray {
        val wanted = width.toDouble() / height
        val whole = resize != "crop"
        val used = if (whole) w.toDouble() else minOf(w.toDouble(), wanted * h)
        val tall = if (whole) h.toDouble() else minOf(h.toDouble(), w / wanted)
        val left = (w - used) / 2
        val top = (h - tall) / 2
        return doubleArrayOf(left, top, left + used, top + tall)
    }

    /** Three bytes for each pixel: each is a mean of the pixels around its place, nearer ones more. */
    private fun resized(box: DoubleArray, wide: Int, tall: Int): IntArray {
        val rows = IntArray(3 * wide * h)
        for (x in 0 until wide) {
            val near = Weights(box[0], box[2], wide, w, x)
            for (y in 0 until h) {
                for (channel in 0 until 3) {
                    rows[3 * (y * wide + x) + channel] =
                        near.mean { pixels[y * w + it] shr (16 - 8 * channel) and 255 }
                }
            }
        }
        val result = IntArray(3 * wide * tall)
        for (y in 0 until tall) {
            val near = Weights(box[1], box[3], tall, h, y)
            for (at in 0 until 3 * wide) {
                result[3 * wide * y + at] = near.mean { rows[3 * wide * it + at] }
            }
        }
        return result
    }

    /** Which pixels of a line make pixel [at] of [out], between two places, and how much of each. */
    private class Weights(from: Double, to: Double, out: Int, length: Int, at: Int) {
        val first: Int
        val weights: DoubleArray

        init {
            val step = (to - from) / out
            val reach = maxOf(step, 1.0)
            val center = from + (at + 0.5) * step
            first = maxOf(0, (center - reach + 0.5).toInt())
            val end = minOf(length, (center + reach + 0.5).toInt())
            val found = DoubleArray(end - first) {
                maxOf(0.0, 1.0 - Math.abs(first + it + 0.5 - center) / reach)
            }
            val total = found.sum()
            weights = DoubleArray(found.size) { found[it] / total }
        }

        inline fun mean(value: (Int) -> Int): Int {
            var sum = 0.0
            for (i in weights.indices) sum += weights[i] * value(first + i)
            return (sum + 0.5).toInt()
        }
    }
}
