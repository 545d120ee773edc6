// Stand-ins for what the packages' Swift code uses of Core Graphics. Foundation has the geometry.
@_exported import Foundation

public final class CGImage {
    init() {}
    public var width: Int { 0 }
    public var height: Int { 0 }
}

public final class CGColorSpace {
    init() {}
}

public func CGColorSpaceCreateDeviceRGB() -> CGColorSpace { CGColorSpace() }

public enum CGImageAlphaInfo: UInt32 {
    case none = 0
    case noneSkipLast = 5
}

public enum CGInterpolationQuality: Int32 {
    case `default` = 0
    case none = 1
    case low = 2
    case high = 3
    case medium = 4
}

public final class CGContext {
    public init?(
        data: UnsafeMutableRawPointer?, width: Int, height: Int, bitsPerComponent: Int,
        bytesPerRow: Int, space: CGColorSpace, bitmapInfo: UInt32
    ) { return nil }
    public var interpolationQuality: CGInterpolationQuality = .default
    public enum DrawingOrder { case above }
    public func draw(_ image: CGImage, in rect: CGRect, byTiling: Bool = false) {}
}
