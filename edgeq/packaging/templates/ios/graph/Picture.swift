import CoreGraphics
import Foundation

extension GraphModel {
    /// A picture as the input of the model, in the way in which the model was quantized.
    ///
    /// Pixels of 0 to 255 are multiplied by @SCALE@; the mean is subtracted, and the result is divided
    /// by the standard deviation of each channel.
    public static func input(of picture: CGImage) throws -> [Float] {
        let width = @WIDTH@, height = @HEIGHT@
        let mean: [Float] = [@MEAN@], deviation: [Float] = [@STD@]
        var pixels = [UInt8](repeating: 0, count: 4 * width * height)
        let drawn = pixels.withUnsafeMutableBytes { bytes -> Bool in
            guard
                let context = CGContext(
                    data: bytes.baseAddress, width: width, height: height, bitsPerComponent: 8,
                    bytesPerRow: 4 * width, space: CGColorSpaceCreateDeviceRGB(),
                    bitmapInfo: CGImageAlphaInfo.noneSkipLast.rawValue)
            else { return false }
            context.interpolationQuality = .medium
            context.draw(picture, in: place(picture.width, picture.height, width, height))
            return true
        }
        if !drawn { throw ModelError.missing("a bitmap of \(width) x \(height)") }
        var values = [Float](repeating: 0, count: 3 * width * height)
        for pixel in 0..<(width * height) {
            for channel in 0..<3 {
                let value = Float(pixels[4 * pixel + channel]) * @SCALE@
                values[@PLACE@] = (value - mean[channel]) / deviation[channel]
            }
        }
        return values
    }

    /// Where a picture is drawn: the way "@RESIZE@".
    private static func place(_ w: Int, _ h: Int, _ width: Int, _ height: Int) -> CGRect {
        let across = Double(width) / Double(w), down = Double(height) / Double(h)
        let factor = @FACTOR@
        let size = CGSize(width: Double(w) * factor.x, height: Double(h) * factor.y)
        return CGRect(
            x: (Double(width) - size.width) / 2, y: (Double(height) - size.height) / 2,
            width: size.width, height: size.height)
    }
}
